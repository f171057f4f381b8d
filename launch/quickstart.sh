#!/usr/bin/env bash
# Train a small model on real text by plain DDP, PowerSGD and vsa_ddp, and see loss and bytes side by side:
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh --help
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" quickstart
root=$PWD
cd "$here"
PYTHONPATH=$root exec "$root/.venv/bin/python" -m launch.quickstart "$@"
