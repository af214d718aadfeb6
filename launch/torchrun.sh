#!/usr/bin/env bash
# Train under torchrun, on one host or several:
#
#   launch/torchrun.sh                                             digits, 2 processes, all-reduce
#   BACKEND=ps NPROC=4 launch/torchrun.sh train text --epochs 1    worker 0 starts the server (one host)
#   NPROC=gpu launch/torchrun.sh my_script.py --its-own --flags    a script that calls dtrain.connect()
#   NNODES=2 MASTER=host0:29400 launch/torchrun.sh                 on each of two nodes
#   NNODES=1:4 MASTER=host0:29400 MAX_RESTARTS=9 \
#       launch/torchrun.sh train fashion --run-dir DIR --auto-resume    nodes may come and go; host0 must stay
#
# Variables: BACKEND (allreduce, ps), NPROC (processes on a node), NNODES (a number, or MIN:MAX), MASTER (host:port, the
# host being one of the nodes), JOB (a name of the job, where several use one MASTER), MAX_RESTARTS, LOCAL_ADDR (this
# node's address, where others do not know its name), SERVERS (addresses of running `dtrain server`s), DTRAIN_KEYS
# (keys: with BACKEND=ps on several nodes each starts a server), TORCHRUN (the command).
# torchrun's store listens on all interfaces of the master and is neither encrypted nor authenticated.
set -euo pipefail

export DTRAIN_BACKEND=${BACKEND:-allreduce}
[[ -z ${SERVERS:-} ]] || export DTRAIN_SERVERS=$SERVERS
torchrun=${TORCHRUN:-torchrun}
# What it is sent it passes on to the workers; SIGUSR1 too, by which Slurm asks for a checkpoint.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

job=(--nproc-per-node "${NPROC:-2}" --max-restarts "${MAX_RESTARTS:-0}")
if [[ ${NNODES:-1} == 1 ]]; then
  job+=(--standalone)
else
  job+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER, host:port}")
  job+=(--rdzv-id "${JOB:-dtrain}")
  # A new store for each attempt: with one for all, torch 2.13 does not let a node in that comes after the first.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  [[ -z ${LOCAL_ADDR:-} ]] || job+=(--local-addr "$LOCAL_ADDR")
fi

if [[ ${1:-} == *.py ]]; then
  exec "$torchrun" "${job[@]}" "$@"
fi
if (( $# == 0 )); then
  set -- train digits
fi
exec "$torchrun" "${job[@]}" -m dtrain "$@"
