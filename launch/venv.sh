# Sourced by the commands: makes .venv at the root, with the extra named in $1, and again whenever what it depends on
# has changed. Nothing is compiled.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
stamp=.venv/.installed-$1
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; set PYTHON to one." >&2
    exit 1
  }
  echo "Installing into .venv (once; about a minute) ..." >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]" || exit 1
  echo "$wanted" >"$stamp"
fi
