#!/usr/bin/env bash
# Train on several machines: run the same line on each, the rendezvous host first or within a minute of the others.
#   RENDEZVOUS=host0:29400 NODES=4 bash launch/multi_node.sh --steps 1000 --checkpoint /shared/run1
#   RENDEZVOUS=host0:29400 NODES=2:4 bash launch/multi_node.sh --checkpoint /shared/run1    # elastic: 2 to 4 machines
#   RENDEZVOUS=10.0.0.5:29400 NODES=2 RANKS_PER_NODE=1 JOB=run2 PYTHON=python bash launch/multi_node.sh
#
#   RENDEZVOUS      host:port; any one of the machines, by a name or IPv4 address that all of them reach
#   NODES           number of machines, or MIN:MAX
#   RANKS_PER_NODE  processes on this machine; default: one per GPU, or 1 on CPU
#   JOB             name of the job, the same on all machines; default: vsa_ddp
#   MAX_RESTARTS    how often the ranks are started again after a failure; default: 3
#   PYTHON          your own environment; default: .venv of this repository (make it first if the folder is shared)
#   OMP_NUM_THREADS, GLOO_SOCKET_IFNAME: chosen here unless they are set
#
# Arguments go to launch/train.py. Rank 0, on whichever machine, writes --json and --checkpoint (and with --method vsa-local
# each rank its own part).
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

[ -n "${RENDEZVOUS:-}" ] || fail "RENDEZVOUS is not set; give host:port of one of the machines, as host0:29400."
[[ $RENDEZVOUS =~ ^[A-Za-z0-9._-]+:([0-9]{1,5})$ ]] && ((10#${BASH_REMATCH[1]} >= 1 && 10#${BASH_REMATCH[1]} <= 65535)) ||
  fail "RENDEZVOUS must be host:port, as host0:29400, got $RENDEZVOUS."
[ -n "${NODES:-}" ] || fail "NODES is not set; give the number of machines, or MIN:MAX, as 2:4."
[[ $NODES =~ ^([1-9][0-9]{0,4})(:([1-9][0-9]{0,4}))?$ ]] && ((BASH_REMATCH[1] <= ${BASH_REMATCH[3]:-99999})) ||
  fail "NODES must be a number of machines, or MIN:MAX with MIN not above MAX, got $NODES."
[[ ${RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE must be a number of processes, got $RANKS_PER_NODE."
[[ ${MAX_RESTARTS:=3} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS must be a number of restarts, got $MAX_RESTARTS."

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
ranks=${RANKS_PER_NODE:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_rank "$ranks")}

# This machine's address for the others, its interface, and whether the rendezvous is here
place=$("$python" -m launch.network "$RENDEZVOUS") || exit 2
read -r address interface is_host <<<"$place"
[ "$interface" = - ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
# A second torchrun on the same machine finds the port taken and joins, but only if it was not told to be the host
[[ $address = 127.* ]] && conf=() || conf=(--rdzv-conf "is_host=$is_host")

[[ " $* " == *" --checkpoint"[\ =]* || $MAX_RESTARTS = 0 ]] ||
  echo "note: without --checkpoint FOLDER a restart begins again at the first step." >&2
# Each attempt gets a store of its own: the one that torchrun shares by default still has the addresses of dead ranks
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$ranks" --max-restarts="$MAX_RESTARTS" \
  --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${JOB:-vsa_ddp}" ${conf[@]+"${conf[@]}"} \
  --local-addr="$address" -m launch.train "$@"
