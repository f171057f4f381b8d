#!/usr/bin/env bash
# Format, lint, types, tests. Arguments go to pytest:
#   bash tests/run.sh
#   bash tests/run.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh" test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 "$@"
