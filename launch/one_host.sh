#!/usr/bin/env bash
# Trains on every accelerator of this machine, or on its processor where there is none.
#
#   CONFIG    configuration            (configs/quickstart.py)
#   WORKDIR   directory of the run     (runs/ and the configuration's name)
#   PYTHON    interpreter              (.venv/bin/python where there is one, else python3)
#   further arguments: settings, --config.KEY=VALUE
#
# Example: CONFIG=configs/voxceleb2_resnet36.py launch/one_host.sh --config.data.train=/data/voxceleb2/dev
set -euo pipefail
cd "$(dirname "$0")/.."
CONFIG=${CONFIG:-configs/quickstart.py}
NAME=${CONFIG##*/}
WORKDIR=${WORKDIR:-runs/${NAME%%.py*}}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

exec "$PYTHON" -m kmq_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@"
