"""CAM++ on VoxCeleb2: trained from the start, or quantized with a full-precision network as its teacher.

    python -m kmq_jax.train --config=configs/campplus.py --workdir=runs/campplus \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.validation.data=/data/voxceleb1/test \
        --config.validation.trials=/data/voxceleb1/veri_test2.txt

7.18 M parameters; 512-dimensional embeddings. The recipe is WeSpeaker's (`training.config.wespeaker_config`). Not run
in full by this project: VoxCeleb2 was not at hand. `:4`, `:3` and `:2` train 3D-Speaker's network at so many bits, by
distillation, on the sets that configs/wespeaker34_distilled.py uses (`--config.data.root=DIR`). Batch normalisation
goes by running statistics: by those of 16 crops, which also normalise the embedding, no student comes near its teacher.
They compute in float32, for a processor, and need 16 GB:

    kmq-jax import_model --source=3dspeaker-campplus-zh-en.pt --out=runs/campplus-3dspeaker
    python -m kmq_jax.train --config=configs/campplus.py:2 --workdir=runs/campplus-2bit \
        --config.init_from=runs/campplus-3dspeaker --config.data.root=DIR

`:smoke` runs the same code in seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.study.config import EPOCHS
from kmq_jax.training.config import default_config, distilled, smoke, wespeaker_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is the bits (4, 3, 2), "smoke" or nothing."""
    if arg in (None, "", "smoke"):
        config = wespeaker_config("campplus")
        return smoke(config) if arg == "smoke" else config
    if arg not in ("2", "3", "4"):
        raise UserError(f"configs/campplus.py:{arg} must be 2, 3, 4 or smoke")
    config = default_config("campplus", embedding_size=192, floor=1e-12, activation="relu")
    config.frontend = "3dspeaker"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", crop_seconds=2.0)
    config.validation.update(data=root + "/so762/dev", trials=root + "/so762/dev/trials.txt", epochs=EPOCHS[arg])
    distilled(config, int(arg), rules=(("^stem/conv1/", 0),), fit_crops=400)
    config.learning_rate.peak *= 0.1  # over a hundred layers follow one another, with nothing that normalises afresh
    config.update(batch_size=16, epochs=EPOCHS[arg], dtype="float32", batch_norm="running")
    return config
