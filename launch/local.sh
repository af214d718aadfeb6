#!/usr/bin/env bash
# Train on this host, workers and server as processes:
#
#   launch/local.sh                                    digits, 2 workers, parameter server
#   BACKEND=allreduce WORKERS=4 launch/local.sh text --epochs 1
#   WORKERS=4 launch/local.sh my_script.py --its-own --flags      a script that calls dtrain.connect()
#
# Variables: BACKEND (ps, allreduce; for recipes also threads, solo), WORKERS, TIMEOUT_S, DTRAIN (the command).
set -euo pipefail

backend=${BACKEND:-ps}
workers=${WORKERS:-2}
timeout_s=${TIMEOUT_S:-60}
dtrain=${DTRAIN:-dtrain}

job=(--backend "$backend" --workers "$workers" --timeout-s "$timeout_s")
if [[ ${1:-} == *.py ]]; then
  exec "$dtrain" launch "${job[@]}" "$@"
fi
exec "$dtrain" train "${@:-digits}" "${job[@]}"
