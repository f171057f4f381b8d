# Sourced by the launches: sets python to the interpreter that trains, and lets it find this repository from any folder.
# PYTHON, if given, is your own environment, used as it is; otherwise .venv, made when it is missing.
caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
  "$python" - <<'CHECK' || exit 2
import sys
from importlib.util import find_spec
missing = [name for name in ("torch", "numpy", "typer", "tqdm") if find_spec(name) is None]
if sys.version_info < (3, 11) or missing:
    needed = ["Python 3.11"] * (sys.version_info < (3, 11)) + missing
    sys.exit(f"error: PYTHON={sys.executable} has no {', '.join(needed)}; install them there, or unset PYTHON.")
CHECK
else
  source "$root/launch/venv.sh" quickstart
  python=$root/.venv/bin/python
fi
cd "$caller" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# Threads of each of $1 ranks on this machine. torchrun sets 1, or with one rank per machine nothing at all
threads_per_rank() {
  local cores
  cores=$(OMP_NUM_THREADS= nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  echo $((cores > $1 ? cores / $1 : 1))
}
