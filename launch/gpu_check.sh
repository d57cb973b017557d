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
# Example: WHEELS=wheels OUT=h100.jsonl launch/gpu_check.sh
set -euo pipefail
BEGIN=$SECONDS
HERE=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$HERE/.venv/bin/python" ] && echo "$HERE/.venv/bin/python" || echo python3)}
export PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$SITE"
  done
  export PYTHONPATH=$PYTHONPATH:$SITE
fi
"$PYTHON" -m kmq_jax bench accelerator --out="${OUT:-accelerator.jsonl}" \
  --limit="$((${LIMIT:-480} - SECONDS + BEGIN))" "$@"
