"""The whole study of a real WeSpeaker ResNet34 on real speech, on two CPU cores.

    python -m kmq_jax.study --config=configs/wespeaker_so762.py --workdir=runs/wespeaker \
        --config.init_from=voxceleb_resnet34.onnx --config.data.root=DIR

DIR holds `so762/{train,dev}` and `words/{train,dev}`: Kaldi directories with `trials.txt` in each dev. The network is
imported from ONNX, PyTorch or a MODEL and quantized by distillation from itself, without speaker labels: so that what
differs from full precision is what quantization did. `--config.study.label_weight=0.1` adds the labels. Cascades are
calibrated on one half of so762/dev's speakers and evaluated on the other, and the reverse; words/dev is out of domain.

`--config.study.recipe=kmqat` trains by KMQAT as published instead, for as many epochs unless
`--config.study.epochs.2=40` and the like say otherwise. The stem stays in full precision all the same
(`--config.study.rules='()'`: not), and the network has no batch normalisation to measure. One imported by
`kmq-jax import_model --unfold=DATA` has (`--config.init_from=MODEL --config.model.norm=batch`).

`configs/wespeaker_so762.py:compare` is the comparison of both recipes, on the labels, for one epoch (216 steps) at
each number of bits, with full precision trained on by either recipe's loss for as many steps: the control that tells
what labels gain from what bits cost. `study.json` then holds `differences` with paired intervals.

`configs/wespeaker_so762.py:free` is the study without training at 8, 4, 3 and 2 bits, to stand beside other networks.

`configs/wespeaker_so762.py:so762` is the study on speechocean762 alone, which `kmq-jax lay_out` fetches.

`configs/wespeaker_so762.py:levels` puts sets of levels side by side that are fitted alike, without training: by
k-means, uniform ones of a fitted scale and offset, uniform ones over the weights' range, and powers of two.

`.github/results/README.md` shows the results (`wespeaker.json`). `--config.study.nested=False` leaves out the nested
network.
"""

import ml_collections

from kmq_jax.study.config import NO_EPOCHS, add_evaluation_sets, smoke_study, study_config, without_training
from kmq_jax.study.options import PATTERNED
from kmq_jax.training.config import default_config, known_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "compare", "free", "levels", "smoke", "so762" or nothing."""
    known_arg(arg, "compare", "free", "levels", "smoke", "so762")
    sets = ("so762",) if arg == "so762" else ("so762", "words")
    config = default_config("wespeaker_resnet34", norm="bias")
    config.frontend, config.init_from = "wespeaker", "voxceleb_resnet34.onnx"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    train = root + "/so762/train" if arg == "so762" else root + "/so762/train," + root + "/words/train"
    config.data.update(train=train, crop_seconds=2.0)
    config.update(batch_size=16, checkpoint_epochs=1.0, dtype="bfloat16")
    study_config(
        config,
        rules=(("^stem/", 0),),
        diagnose=sets,
        diagnosis={"retention_utterances": 120, "layer_utterances": 24, "hessian_draws": 6},
        calibrate="so762",
        cascades=(("trained", (2, 3, 4)), ("trained", (2, 32)), ("distilled-nested", (2, 3, 4))),
    )
    if arg == "compare":
        epochs = dict.fromkeys(("4", "3", "2", "32"), 1.0)
        config.study.update(also=("kmqat",), label_weight=0.1, nested=False, epochs=epochs, cascades=(), diagnose=())
    if arg == "levels":
        config.study.update(also=PATTERNED, nested=False, epochs=NO_EPOCHS, cascades=(), diagnose=())
    if arg == "free":
        without_training(config)
    add_evaluation_sets(config, root, {name: f"{name}/dev" for name in sets})
    return smoke_study(config) if arg == "smoke" else config
