"""The paper's whole study of ResNet-36: training, KMQAT at 4, 3 and 2 bits, diagnosis, cascade, on the paper's sets.

    python -m kmq_jax.study --config=configs/paper_resnet36.py --workdir=runs/paper36 \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.study.root=/data

Sets and steps: `kmq_jax.study.config.paper_study`; KMQAT: `kmq_jax.training.config.published_kmqat`. `:public` takes
the full-precision recipe of the first author's public code where it differs from the paper.

Each set lies below `study.root`, as `vox1_o/` with `vox1_o/trials.txt`, or is given by flags (VoxCeleb1's three lists
may share their recordings). Three sets need a word:

- CN-Celeb is read as released, `--config.study.evaluate.cnceleb.data=/data/CN-Celeb_flac/eval`, with its trials
  `--config.study.evaluate.cnceleb.trials=/data/CN-Celeb_flac/eval/lists/trials.lst` and enrolment models of several
  recordings, `--config.study.evaluate.cnceleb.models=/data/CN-Celeb_flac/eval/lists/enroll.map`. Without flags the
  release is looked for in `cnceleb/` below the root.
- VoxTube has no official trials. `--config.study.evaluate.voxtube.data=/data/voxtube` needs a list of your own, which
  may be drawn: `kmq-jax draw_trials --data=/data/voxtube --out=voxtube.txt`, and
  `--config.study.evaluate.voxtube.trials=voxtube.txt`. Figures on it are then not the paper's.
- CommonBench's release is not described publicly, so its layout here is a guess: recordings as in any DATA, and trials
  in `comparisons.txt`. `--config.study.evaluate.commonbench.data=` and `--config.study.evaluate.commonbench.trials=`
  say otherwise.

Not run in full by this project: neither the corpora nor such hardware was at hand. `:smoke` runs every step on
synthetic voices.
"""

import ml_collections

from kmq_jax.study.config import paper_study, smoke_study
from kmq_jax.training.config import known_arg, paper_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "public", "smoke" or nothing."""
    known_arg(arg, "public", "smoke")
    config = paper_study(paper_config("resnet36", public=arg == "public"))
    config.study.published = {
        "in domain": {"32": 1.234, "4": 1.278, "3": 1.297, "2": 1.462, "cascade": 1.277},
        "out of domain": {"32": 7.923, "2": 8.538, "cascade": 7.952},
        "overall": {"32": 3.910, "2": 4.293, "cascade": 3.947},
    }
    config.study.published_figures = {
        "min_dcf": {"in domain": {"32": 0.118, "4": 0.124, "3": 0.123, "2": 0.146}},
        "drift": {
            "in domain": {
                "full": {"4": 0.0147, "3": 0.0175, "2": 0.0301},
                "test-only": {"4": 0.0108, "3": 0.0133, "2": 0.0277},
            },
            "out of domain": {
                "full": {"4": 0.0228, "3": 0.0248, "2": 0.0372},
                "test-only": {"4": 0.0174, "3": 0.0190, "2": 0.0327},
            },
        },
        "shift": {"vox1_h": {"2": {"nontarget": 0.0174, "target": -0.0189}}},
        "pearson": {"vox1_h": {"2": 0.992}, "voxtube": {"2": 0.986}},
        "flips": {"vox1_h": {"4": (0.2043, 0.0014, "~0"), "3": (0.2138, 0.0037, "~0"), "2": (0.2389, 0.0335, 1.6e-4)}},
        "order": ("stage2", "stage3"),
    }
    return smoke_study(config) if arg == "smoke" else config
