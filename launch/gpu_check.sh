#!/usr/bin/env bash
# Measures speed on this machine's accelerator: training steps, input, extraction, scoring, beside PyTorch where that is
# installed. One JSON line a figure, as soon as it is known; then a table. Takes at most LIMIT seconds; downloads nothing.
#
#   OUT      file that lines are appended to             (accelerator.jsonl)
#   LIMIT    seconds in all                              (480)
#   WHEELS   folder of wheels of packages that are missing here; unpacked to a temporary directory   (none)
#   PYTHON   interpreter                                 (.venv/bin/python where there is one, else python3)
#   further arguments: those of `kmq-jax bench accelerator`, such as --parts=step,qat
#
# What the time did not suffice for is named at the end; a second run with those --parts appends it to OUT. A script that
# is told to end (SIGTERM, SIGHUP, Ctrl-C) ends the part that runs, too.
#
# Example: WHEELS=wheels OUT=h100.jsonl launch/gpu_check.sh
set -euo pipefail
BEGIN=$SECONDS
HERE=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$HERE/.venv/bin/python" ] && echo "$HERE/.venv/bin/python" || echo python3)}
export PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH}
SITE=
CHILD=
trap '[ -z "$SITE" ] || rm -rf "$SITE"' EXIT
# In the background and waited for: bash looks at a signal only once what runs in the foreground has ended.
end() {
  trap - TERM HUP INT
  if [ -n "$CHILD" ]; then
    kill -TERM "$CHILD" 2>/dev/null || true
    wait "$CHILD" || true
  fi
  exit "$1"
}
trap 'end 143' TERM
trap 'end 129' HUP
trap 'end 130' INT
if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$SITE"
  done
  export PYTHONPATH=$PYTHONPATH:$SITE
fi
"$PYTHON" -m kmq_jax bench accelerator --out="${OUT:-accelerator.jsonl}" \
  --limit="$((${LIMIT:-480} - SECONDS + BEGIN))" "$@" &
CHILD=$!
wait "$CHILD"
