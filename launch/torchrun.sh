#!/usr/bin/env bash
# Train under torchrun, on one host or several:
#
#   launch/torchrun.sh                                             digits, 2 processes, all-reduce
#   BACKEND=ps NPROC=4 launch/torchrun.sh train text --epochs 1    worker 0 starts the server (one host)
#   NPROC=gpu launch/torchrun.sh my_script.py --its-own --flags    a script that calls dtrain.connect()
#   NNODES=2 NODE_RANK=0 MASTER=host0:29400 launch/torchrun.sh     on each node, with its NODE_RANK
#
# Variables: BACKEND (allreduce, ps), NPROC (processes on a node), NNODES, NODE_RANK, MASTER (host:port of node 0),
# MAX_RESTARTS, SERVERS (address of a running `dtrain server`), TORCHRUN (the command).
# torchrun's store listens on all interfaces of node 0 and is neither encrypted nor authenticated.
set -euo pipefail

export DTRAIN_BACKEND=${BACKEND:-allreduce}
[[ -z ${SERVERS:-} ]] || export DTRAIN_SERVERS=$SERVERS
torchrun=${TORCHRUN:-torchrun}

job=(--nproc-per-node "${NPROC:-2}" --max-restarts "${MAX_RESTARTS:-0}")
if [[ ${NNODES:-1} == 1 ]]; then
  job+=(--standalone)
else
  job+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK, 0 on the first node}")
  job+=(--rdzv-backend static --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}")
fi

if [[ ${1:-} == *.py ]]; then
  exec "$torchrun" "${job[@]}" "$@"
fi
if (( $# == 0 )); then
  set -- train digits
fi
exec "$torchrun" "${job[@]}" -m dtrain "$@"
