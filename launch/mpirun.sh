#!/usr/bin/env bash
# Train under mpirun, MPICH's or Open MPI's, which starts the workers; nothing else of MPI is used:
#
#   launch/mpirun.sh                                                digits, 2 workers on this host, all-reduce
#   BACKEND=ps WORKERS=4 launch/mpirun.sh train text --epochs 1     worker 0 starts the server (one host)
#   WORKERS=8 HOSTS=a:4,b:4 MASTER=a:29400 launch/mpirun.sh         hosts with their workers; ps also wants KEYS
#   launch/mpirun.sh my_script.py --its-own --flags                 a script that calls dtrain.connect()
#
# Variables: BACKEND (allreduce, ps), WORKERS (in all), HOSTS, MASTER (host:port of the first), KEYS, SERVERS (address
# of a running `dtrain server`), MPIRUN (the command), PYTHON.
#
# Ctrl-C, SIGTERM or SIGUSR1 once: the workers save at a common step and end with 75; twice: they end at once. MPICH's
# exit code is the bitwise or of the workers' (9 where one was killed), Open MPI's that of the first to fail.
set -euo pipefail

export DTRAIN_BACKEND=${BACKEND:-allreduce} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ -z ${SERVERS:-} ]] || export DTRAIN_SERVERS=$SERVERS
[[ -z ${KEYS:-} ]] || export DTRAIN_KEYS=$KEYS
if [[ -n ${HOSTS:-} ]]; then
  : "${MASTER:?set MASTER, host:port of the first of HOSTS}"
  export MASTER_ADDR=${MASTER%:*} MASTER_PORT=${MASTER##*:}
else
  folder=$(mktemp -dt dtrain-XXXXXX)
  trap 'rm -rf "$folder"' EXIT
  export DTRAIN_STORE=file://$folder/store # where nothing listens
fi
mpirun=${MPIRUN:-mpirun}

flags=(-n "${WORKERS:-2}" --bind-to none)
[[ -z ${HOSTS:-} ]] || flags+=(--host "$HOSTS")
if [[ $("$mpirun" --version) == *"Open MPI"* ]]; then # it takes along only what it is told to; MPICH all
  while read -r name; do
    flags+=(-x "$name")
  done < <(compgen -A export | grep -E '^(DTRAIN|MASTER|OMP|GLOO|NCCL)_')
fi

command=("${PYTHON:-python3}")
if [[ ${1:-} != *.py ]]; then
  command+=(-m dtrain)
fi
if (($# == 0)); then
  set -- train digits
fi

# In a process group of its own: Ctrl-C is for this shell, which asks in the way that both kinds of mpirun pass on.
set -m
signalled='' ask=USR1 code=0
trap 'signalled=yes' INT TERM USR1 HUP
"$mpirun" "${flags[@]}" "${command[@]}" "$@" </dev/null &
while true; do
  if [[ ! $signalled ]]; then
    wait $! && code=0 || code=$?
  fi
  [[ $signalled ]] || break # else it is the signal that ended `wait`
  signalled=
  kill -"$ask" $! || true
  if [[ $ask == INT ]]; then # the first of two goes to the workers
    sleep 0.1
    kill -INT $! || true
  fi
  ask=INT
done
exit "$code"
