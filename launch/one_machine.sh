#!/usr/bin/env bash
# Train on this machine, one rank per GPU, or 2 on CPU. All arguments but --ranks go to launch/train.py:
#   bash launch/one_machine.sh --steps 1000
#   bash launch/one_machine.sh --ranks 4 --steps 200 --json figures.json
#   MAX_RESTARTS=3 bash launch/one_machine.sh --checkpoint runs/saved
#   PYTHON=python bash launch/one_machine.sh            # in your own environment, not .venv
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

ranks=
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --ranks) ranks=${2:-none}; shift $(($# > 1 ? 2 : 1)) ;;
    --ranks=*) ranks=${1#*=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks must be a number of processes, got $ranks."
[[ ${MAX_RESTARTS:=0} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS must be a number of restarts, got $MAX_RESTARTS."

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
[ -n "$ranks" ] || ranks=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_rank "$ranks")}
# All ranks are here, whatever the host's name resolves to
[ "$(uname)" != Linux ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$ranks" --max-restarts="$MAX_RESTARTS" \
  -m launch.train ${arguments[@]+"${arguments[@]}"}
