#!/usr/bin/env bash
# The first steps of somebody who has a model and recordings, as printed commands: .ci/first_steps.sh BIN MODEL
# BIN is the directory of an installed kmq-jax. It writes into the directory it is called in.
set -euo pipefail
PATH=$1:$PATH
model=$2

python -c '
import soundfile
from kmq_jax.data.source import open_source
voices = open_source("synthetic:test?speakers=2&utterances=2")
for name, number in {"alice1": 0, "alice2": 1, "bob": 2}.items():
    soundfile.write(f"{name}.wav", voices.load(number), 16000)'
set -x
kmq-jax --version
kmq-jax threshold --model="$model" --data="synthetic:dev?speakers=8&utterances=4" --false_accept=0.1 --out=threshold.json
kmq-jax enroll --store=people --model="$model" --speaker=alice alice1.wav
kmq-jax verify --store=people --speaker=alice alice2.wav --threshold=threshold.json
kmq-jax identify --store=people bob.wav --top=1
