#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: builds an image of this checkout and submits gke.yaml.
#
#   BUCKET      gs:// bucket, without gs://          needed; it appears as /mnt/bucket
#   IMAGE       where the image goes                 needed, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/kmq_jax
#   NAME        of the job                           (kmq-jax)
#   TPU         kind of the node pool                (tpu-v5-lite-podslice)
#   TOPOLOGY    of the slice                         (4x4)
#   HOSTS       of the slice                         (4)
#   CHIPS       of a host                            (4)
#   ACCOUNT     Kubernetes service account that may use the bucket  (default)
#   CONFIG      configuration                        (configs/quickstart.py)
#   WORKDIR     directory of the run                 (/mnt/bucket/runs/ and the configuration's name)
#   DRY_RUN     1: prints what would be submitted    (0)
#   further arguments: settings, --config.KEY=VALUE
#
# Example: BUCKET=my-bucket IMAGE=europe-west4-docker.pkg.dev/me/ml/kmq_jax CONFIG=configs/voxceleb2_resnet36.py \
#          launch/gke.sh --config.data.train=/mnt/bucket/voxceleb2/dev
set -euo pipefail
cd "$(dirname "$0")/.."
: "${BUCKET:?BUCKET must name the bucket}" "${IMAGE:?IMAGE must say where the image goes}"
CONFIG=${CONFIG:-configs/quickstart.py}
FILE=${CONFIG##*/}
export BUCKET IMAGE NAME=${NAME:-kmq-jax} TPU=${TPU:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4}
export HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4} ACCOUNT=${ACCOUNT:-default}

# The arguments as a JSON list, which is YAML: whatever they hold.
ARGUMENTS=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \
  "--config=$CONFIG" "--workdir=${WORKDIR:-/mnt/bucket/runs/${FILE%%.py*}}" "$@")
export ARGUMENTS
FILL='import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ))'
job() { python3 -c "$FILL" <launch/gke.yaml; }

if [ "${DRY_RUN:-0}" = 1 ]; then
  job
  exit
fi
docker build --file=launch/Dockerfile --tag="$IMAGE" .
docker push "$IMAGE"
job | kubectl apply --filename=-
echo "kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
