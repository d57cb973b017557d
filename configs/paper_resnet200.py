"""The paper's whole study of ResNet-200: training, KMQAT at 4, 3 and 2 bits, diagnosis, cascade, on the paper's sets.

    python -m kmq_jax.study --config=configs/paper_resnet200.py --workdir=runs/paper200 \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.study.root=/data

Sets and steps: `kmq_jax.study.config.paper_study`; KMQAT: `kmq_jax.training.config.published_kmqat`. `:public` takes
the full-precision recipe of the first author's public code where it differs from the paper.

How each set is given, CN-Celeb, VoxTube and CommonBench among them: see `configs/paper_resnet36.py`.

Not run in full by this project: neither the corpora nor such hardware was at hand. `:smoke` runs every step on
synthetic voices.
"""

import ml_collections

from kmq_jax.study.config import paper_study, smoke_study
from kmq_jax.training.config import known_arg, paper_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "public", "smoke" or nothing."""
    known_arg(arg, "public", "smoke")
    config = paper_study(paper_config("resnet200", public=arg == "public"))
    config.model.remat = True
    config.study.published = {"in domain": {"32": 0.984, "4": 1.076, "3": 1.081, "2": 1.127}}
    config.study.published_figures = {
        "drift": {
            "in domain": {
                "full": {"4": 0.0198, "3": 0.0214, "2": 0.0257},
                "test-only": {"4": 0.0151, "3": 0.0162, "2": 0.0209},
            },
            "out of domain": {
                "full": {"4": 0.0291, "3": 0.0308, "2": 0.0353},
                "test-only": {"4": 0.0228, "3": 0.0242, "2": 0.0285},
            },
        },
        "flips": {"vox1_h": {"2": (0.2204, 0.0241, 5.8e-5)}},
        "order": ("stage3", "stage2"),
    }
    return smoke_study(config) if arg == "smoke" else config
