"""Settings of a study with their defaults. A configuration file adds them to those of the full-precision training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.core.errors import UserError
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.training.config import smoke

EPOCHS = {"4": 1.0, "3": 1.5, "2": 7.5, "nested": 3.0, "mixed": 0.0, "32": 0.0}
"""Epochs of quantization-aware training by bits, for a few thousand utterances. Those with 0 are not trained."""
NO_EPOCHS = dict.fromkeys(EPOCHS, 0.0)


def study_config(config: ml_collections.ConfigDict, **settings: Any) -> ml_collections.ConfigDict:
    """Adds the section `study`, which says what `kmq_jax.study` does with the network. Training does not look at it.

    Args:
        config: of the full-precision training; changed in place.
        **settings: of the section, in place of the defaults. `diagnosis` and `calibration` change only what they name;
            bits that `epochs` leaves out are not trained.

    Returns:
        `config`.

    Raises:
        UserError: the section has no such setting.
    """
    config.study = {
        "evaluate": {},  # name: {"data": DATA, "trials": TRIALS} of each evaluation set
        "bits": (4, 3, 2),
        "recipe": "distilled",  # or "kmqat": as published. How networks are trained at fewer bits
        "also": (),  # further recipes, to compare with
        "seeds": 1,  # trainings of each recipe at each number of bits
        "mixed": 0.0,  # also mixed precision of so many bits a weight on average
        "nested": True,  # also all bits in one file
        "rules": (),  # as quant.rules
        # By bits. What has none is quantized without training alone. Nested codebooks are trained where the
        # smallest number of bits is. "mixed": of each phase. "32": full precision trains on by each recipe's loss, as
        # a control.
        "epochs": EPOCHS,
        "learning_rate": 0.0,  # of quantization-aware training; 0: as the recipe says
        "label_weight": 0.0,  # of the recipe "distilled": `loss.weight`, of margin softmax beside the teacher
        "compute": "float32",  # the arithmetic of extraction
        "engine": "jax",  # what extracts: "jax", "onnxruntime", or "auto", ONNX Runtime on a CPU
        "max_seconds": 0.0,  # extraction takes only so much of each recording; 0: all of it
        "max_frames": 0,  # or so many frames, less the mean over all of the recording's; 0: all
        "quick_compile": False,  # without optimizations, for networks so tiny that compiling is all they cost
        "diagnose": (),  # names of evaluation sets
        "diagnosis": dataclasses.asdict(DiagnosisOptions()),  # how; `compute` is the study's
        "calibrate": "",  # name of the evaluation set that cascades are calibrated on
        "calibration": dataclasses.asdict(CalibrationOptions()),  # how
        # (family, bits) as ("trained", (2, 3, 4)), by the recipe; ("distilled-nested", (2, 32)), 32: unquantized. A
        # third word, "published", takes the paper's gates: equally wide on both sides, by EER against cost.
        "cascades": (),
        "groups": {},  # name: names of the evaluation sets whose mean EER is shown
        "published": {},  # group: {bits or "cascade": EER %}, to stand beside what is measured
        "published_figures": {},  # others, as `study.published` reads them
    }
    for name, value in settings.items():
        if name not in config.study:
            raise UserError(f"study has no setting {name!r}; it has {', '.join(sorted(config.study))}")
        if name in ("diagnosis", "calibration"):
            config.study[name].update(value)
        else:
            config.study[name] = NO_EPOCHS | value if name == "epochs" else value  # all can then be set by flags
    return config


def add_evaluation_sets(
    config: ml_collections.ConfigDict, root: ml_collections.FieldReference, places: Mapping[str, str]
) -> None:
    """Adds evaluation sets that lie below one directory, each with a `trials.txt` of its own.

    Args:
        config: with a section `study`; changed in place.
        root: of the directory, a setting of its own: `--config.data.root=DIR` then moves all of them.
        places: directories below it, by the names of the sets.

    >>> from kmq_jax.training.config import default_config
    >>> config = study_config(default_config("resnet18"))
    >>> add_evaluation_sets(config, ml_collections.FieldReference("data"), {"so762": "so762/dev"})
    >>> config.study.evaluate.so762.trials
    'data/so762/dev/trials.txt'
    """
    for name, place in places.items():
        config.study.evaluate[name] = {"data": root + f"/{place}", "trials": root + f"/{place}/trials.txt"}


def paper_study(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the paper's study of a network: its sets, KMQAT at 4, 3, 2 and 3.144 bits, one cascade 2>3>4.

    KMQAT trains for 40 epochs at each number of bits, and for as many in each phase of mixed precision. Every weight
    matrix is quantized; nested codebooks, which the paper does not have, are left out. Networks see the first 1,400
    frames of each recording, less the mean over all of its frames. VoxTube's trials alone calibrate the cascade;
    VoxCeleb1-O/E/H, CN-Celeb and CommonBench evaluate. All five are diagnosed, and VoxTube, on which the paper tells a
    correlation. The cascade 2>3>4 has its gates chosen as published, and by this project's rule beside it.

    A set lies below `study.root` as `NAME/` with `NAME/trials.txt`, or where `--config.study.evaluate.NAME.data=` and
    `.trials=` say. CN-Celeb is read as released: `cnceleb/CN-Celeb_flac/eval`, its `lists/trials.lst` and the enrolment
    models of its `lists/enroll.map`, or of what `.models=` says. VoxTube has no official trials, and CommonBench's
    release is not described publicly: its `comparisons.txt`, and that recordings lie as any DATA, are guesses.
    """
    study_config(
        config,
        recipe="kmqat",
        nested=False,
        mixed=3.144,
        epochs={"4": 40.0, "3": 40.0, "2": 40.0, "mixed": 40.0, "nested": 40.0},
        max_frames=1400,
        diagnose=("vox1_o", "vox1_e", "vox1_h", "cnceleb", "commonbench", "voxtube"),
        calibrate="voxtube",
        cascades=(("kmqat", (2, 3, 4), "published"), ("kmqat", (2, 3, 4)), ("kmqat", (2, 32))),
    )
    root = ml_collections.FieldReference("data")
    config.study.root = root
    places = {name: name for name in ("vox1_o", "vox1_e", "vox1_h", "cnceleb", "commonbench", "voxtube")}
    places["cnceleb"] = cnceleb = "cnceleb/CN-Celeb_flac/eval"
    add_evaluation_sets(config, root, places)
    config.study.evaluate.cnceleb.trials = root + f"/{cnceleb}/lists/trials.lst"
    config.study.evaluate.cnceleb.models = root + f"/{cnceleb}/lists/enroll.map"
    config.study.evaluate.commonbench.trials = root + "/commonbench/comparisons.txt"
    inside, outside = ("vox1_o", "vox1_e", "vox1_h"), ("cnceleb", "commonbench")
    config.study.groups = {"in domain": inside, "out of domain": outside, "overall": inside + outside}
    return config


def without_training(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Turns a study into one without training or cascades, at 8, 4, 3 and 2 bits, to compare networks.

    The diagnosis looks at components alone; single layers and Hessians, which take longer, are left out.
    """
    config.study.update(bits=(8, 4, 3, 2), epochs=NO_EPOCHS, nested=False, calibrate="", cascades=(), engine="auto")
    config.study.diagnosis.update(layer_utterances=0, hessian_draws=0)
    return config


def smoke_study(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a study so that all of it passes in seconds: training as `smoke` does, then everything after it."""
    smoke(config)
    voices = {"data": config.validation.data, "trials": config.validation.trials}
    config.study.quick_compile = True
    config.study.bits, config.study.epochs = (4, 2), NO_EPOCHS | {"2": 1.0, "nested": 1.0}
    if config.study.mixed:
        config.study.epochs["mixed"] = 1.0  # two steps in each phase
    config.study.evaluate = ml_collections.ConfigDict({"voices": voices})
    config.study.update(
        calibrate="voices",
        cascades=((("distilled-nested", (2, 4)),) if config.study.nested else ()) + (("trained", (2, 32)),),
    )
    config.study.diagnose = ("voices",)
    config.study.calibration.replicates = 20
    config.study.diagnosis.update(
        retention_utterances=16,
        layer_utterances=16,
        hessian_draws=2,
        hessian_utterances=2,
        hessian_seconds=1.0,
        replicates=40,
    )
    config.study.groups = dict.fromkeys(config.study.groups, ("voices",))
    return config
