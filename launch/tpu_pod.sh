#!/usr/bin/env bash
# Trains on a Google Cloud TPU slice, obtained by a queued resource. Needs gcloud, logged in.
#
#   launch/tpu_pod.sh up      asks for the slice, waits for it, installs this checkout on all its hosts, mounts BUCKET
#   launch/tpu_pod.sh train   starts training on all hosts, or takes it up again; further arguments: --config.KEY=VALUE
#   launch/tpu_pod.sh log     follows what host 0 says
#   launch/tpu_pod.sh stop    saves and stops
#   launch/tpu_pod.sh down    gives the slice back
#
#   ZONE      of the slice                            needed
#   BUCKET    gs:// bucket, without gs://             needed for `up`; it appears as /mnt/bucket on every host
#   NAME      of the slice                            (kmq-jax)
#   TYPE      accelerator type                        (v5litepod-16)
#   RUNTIME   software of its hosts                   (v2-alpha-tpuv5-lite)
#   SPOT      1: cheaper, may be taken back           (0)
#   CONFIG    configuration                           (configs/quickstart.py)
#   WORKDIR   directory of the run                    (/mnt/bucket/runs/ and the configuration's name)
#
# Example: export ZONE=us-west4-a BUCKET=my-bucket CONFIG=configs/voxceleb2_resnet36.py
#          launch/tpu_pod.sh up && launch/tpu_pod.sh train --config.data.train=/mnt/bucket/voxceleb2/dev
set -euo pipefail
cd "$(dirname "$0")/.."
: "${ZONE:?ZONE must name the zone of the slice}"
NAME=${NAME:-kmq-jax}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
CONFIG=${CONFIG:-configs/quickstart.py}
FILE=${CONFIG##*/}
WORKDIR=${WORKDIR:-/mnt/bucket/runs/${FILE%%.py*}}

tpu() { gcloud compute tpus "$@" --zone="$ZONE"; }
on() { tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"; } # on HOST COMMAND

up() {
  : "${BUCKET:?BUCKET must name the bucket}"
  local state options=(--node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  [ "${SPOT:-0}" != 1 ] || options+=(--spot)
  tpu queued-resources describe "$NAME" >/dev/null 2>&1 || tpu queued-resources create "$NAME" "${options[@]}"
  until state=$(tpu queued-resources describe "$NAME" --format='value(state.state)') && [ "$state" = ACTIVE ]; do
    case $state in FAILED | SUSPENDED) echo "the request is $state: see '$0 down'" >&2 && exit 1 ;; esac
    echo "waiting for $TYPE: $state" >&2
    sleep "${POLL:-30}"
  done
  local archive
  archive=$(mktemp)
  git archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$NAME:kmq_jax.tar.gz" --worker=all
  rm "$archive"
  # Cached metadata would hide from one host what another has just written.
  on all "set -e
    mkdir -p kmq_jax && tar -xzf kmq_jax.tar.gz -C kmq_jax
    command -v gcsfuse >/dev/null || {
      key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
      curl -fsS \$apt/doc/apt-key.gpg | sudo tee \$key
      echo \"deb [signed-by=\$key] \$apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
      sudo apt-get -q update && sudo apt-get -qy install gcsfuse
    } >/dev/null
    sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket
    mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 '$BUCKET' /mnt/bucket
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    cd kmq_jax && ~/.local/bin/uv venv -q --python=3.12 --clear .venv
    ~/.local/bin/uv pip install -q --python=.venv/bin/python '.[tpu]'"
}

# A system service outlives this connection, is never started twice, and is stopped by SIGTERM.
train() {
  local words
  words=$(printf ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
  on all "sudo systemd-run --collect --unit=kmq_jax --uid=\$USER --working-directory=\$HOME/kmq_jax \
    --setenv=KMQ_DISTRIBUTED=1 --property=TimeoutStopSec=300 \$HOME/kmq_jax/.venv/bin/python -m kmq_jax.train$words"
}

case ${1:-} in
  up) up ;;
  train) shift && train "$@" ;;
  log) on 0 "sudo journalctl --unit=kmq_jax --output=cat --follow" ;;
  stop) on all "sudo systemctl stop kmq_jax" ;;
  down) tpu queued-resources delete "$NAME" --force --quiet ;;
  *) echo "usage: $0 up|train|log|stop|down (see the head of the file)" >&2 && exit 2 ;;
esac
