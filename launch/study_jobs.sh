#!/usr/bin/env bash
# Makes the networks of a study in several processes, then measures them all: on this machine, or as a SLURM array.
#
#   CONFIG    configuration with a study  (configs/quickstart.py)
#   WORKDIR   directory of the study      (runs/ and the configuration's name); on a disk that all jobs share
#   JOBS      processes at a time         (2)
#   PYTHON    interpreter                 (.venv/bin/python where there is one, else python3)
#   further arguments: settings, --config.KEY=VALUE
#
# Example: JOBS=4 CONFIG=configs/so762_resnet36_small.py:compare launch/study_jobs.sh --config.data.root=/data
#
# As an array, each task makes one network; a last job without an array measures:
#   jobs=$(CONFIG=... launch/study_jobs.sh --only=list | wc -l)
#   array=$(CONFIG=... sbatch --parsable --array=1-"$jobs" launch/study_jobs.sh)
#   CONFIG=... sbatch --dependency=afterok:"$array" launch/study_jobs.sh
#SBATCH --job-name=kmq_jax_study
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A-%a.out
set -euo pipefail
HERE=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
cd "$HERE"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
CONFIG=${CONFIG:-configs/quickstart.py}
NAME=$(basename "$CONFIG")
WORKDIR=${WORKDIR:-runs/${NAME%%.py*}-study}
STUDY=("$PYTHON" -m kmq_jax.study --config="$CONFIG" --workdir="$WORKDIR" "$@")

if [[ " $* " == *" --only=list "* ]]; then
  exec "${STUDY[@]}"
fi
# Nested codebooks grow from another network of the study, so they wait for the end.
names=$("${STUDY[@]}" --only=list | grep -v nested)
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  name=$(sed -n "${SLURM_ARRAY_TASK_ID}p" <<<"$names")
  if [ -n "$name" ]; then
    "${STUDY[@]}" --only="$name"
  fi
  exit
fi
# A process alone would take three quarters of a GPU's memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
xargs -P "${JOBS:-2}" -I '{}' "${STUDY[@]}" --only='{}' <<<"$names"
exec "${STUDY[@]}"
