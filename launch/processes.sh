#!/usr/bin/env bash
# Trains in several processes on this machine, which find one another by its loopback address: a rehearsal of several
# hosts on a processor, or one process a GPU.
#
#   PROCESSES  how many                            (2)
#   DEVICES    of each, simulated                  (2; with JAX_PLATFORMS=cuda each process has one GPU instead)
#   PORT       that process 0 listens to           (a free one)
#   CONFIG, WORKDIR, PYTHON, further arguments: as in one_host.sh, which each process runs
#
# Example: PROCESSES=2 DEVICES=2 CONFIG=configs/quickstart.py:smoke launch/processes.sh
set -euo pipefail
HERE=$(dirname "$0")
PROCESSES=${PROCESSES:-2}
PORT=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT JAX_NUM_PROCESSES=$PROCESSES

GIVEN_FLAGS=${XLA_FLAGS:-}
pids=()
for ((i = 0; i < PROCESSES; i++)); do
  if [ "$JAX_PLATFORMS" = cpu ]; then
    export XLA_FLAGS="$GIVEN_FLAGS --xla_force_host_platform_device_count=${DEVICES:-2}"
  else
    export JAX_LOCAL_DEVICE_IDS=$i
  fi
  JAX_PROCESS_ID=$i "$HERE/one_host.sh" "$@" &
  pids+=($!)
done

# Ctrl-C and SIGTERM reach every process, which save and stop. JAX ends the others where one dies.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal to this script ended the wait, not the process
    one=0
    wait "$pid" || one=$?
  done
  ((status)) || status=$one
done
exit "$status"
