"""Options of a study: what the section `study` of a configuration holds."""

from dataclasses import dataclass
from typing import Literal, Self

from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row
from kmq_jax.core.options import Options, option, shown
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.models.choices import Compute, Engine
from kmq_jax.scoring.options import check_max_seconds

Recipe = Literal["distilled", "kmqat", "uniform", "minmax", "powers"]
"""How networks are made at fewer bits: trained by distillation from full precision, or by KMQAT as published; or by
distillation with levels that k-means does not place (`quant.levels`), of which the scale alone is trained."""
PATTERNED = ("uniform", "minmax", "powers")
NESTED = "nested"
FULL = 32
"""Bits that stand for full precision."""
MIXED = "mixed"
_TRAINED_BY = (*map(str, range(1, 9)), str(FULL), MIXED, NESTED)
"""What `epochs` may name."""
TRAINED = "trained"
"""The family of the networks that the study's recipe trains, whichever it is."""
FAMILIES = ("kmqat", "distilled", "ptq", f"distilled-{NESTED}", f"ptq-{NESTED}")
"""Networks trained by KMQAT as published, trained by this project's own recipe, and quantized without training."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet(Options):
    """Recordings and the trials that compare them."""

    name: str = option("for people")
    data: str = option("DATA", metavar="DATA")
    trials: str = option("TRIALS", metavar="TRIALS")
    models: str | None = option("list of enrolment models, where the trials enrol models", None, metavar="FILE")

    @property
    def lists(self) -> list[str]:
        """The files that say which recordings are compared: trials and, where there are any, enrolment models."""
        return [self.trials, *filter(None, [self.models])]


@dataclass(frozen=True, kw_only=True)
class CascadePlan(Options):
    """A cascade to calibrate and to run."""

    family: str = option("of networks: trained or not, nested or not", choices=FAMILIES)
    bits: tuple[int, ...] = option("of its levels, ascending; 32 is full precision", at_least=1)
    gates: Literal["own", "published"] = option(
        "how they are chosen: as `calibration` says, or as published, equally wide on both sides by EER against cost",
        "own",
    )

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: the bits do not ascend.
        """
        super().__post_init__()
        if not self.bits or any(a >= b for a, b in zip(self.bits, self.bits[1:])):
            raise UserError(f"`bits` (={shown(self.bits)}) must ascend")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """What a study makes of a full-precision network, and what it measures."""

    sets: dict[str, EvaluationSet] = option("evaluation sets, by name")
    bits: tuple[int, ...] = option("at which the network is quantized", (4, 3, 2), at_least=1, at_most=8)
    recipe: Recipe = option(
        "how networks are trained at fewer bits: by distillation from full precision, or by KMQAT as published; or by "
        "distillation with levels of a fixed pattern. Nested ones, which the paper has not, are always distilled",
        "distilled",
    )
    also: tuple[Recipe, ...] = option("further recipes that train at each of `bits`, to compare with", ())
    seeds: int = option("trainings of each recipe at each of `bits`, each from another random seed", 1, at_least=1)
    mixed: float = option("also mixed precision of so many bits a weight on average; 0: none", 0.0, at_least=0)
    nested: bool = option("also all of these bits in one file", True)
    rules: tuple[tuple[str, int], ...] = option(
        "(pattern, bits) before that, first match wins; 0 keeps full precision", ()
    )
    epochs: dict[str, float] = option(
        "of training by bits, `mixed` (of each phase) or `nested`; what is left out is not trained. `32`: full "
        "precision trains on by each recipe's loss, the control that tells what labels and steps do from what bits do"
    )
    learning_rate: float = option("of quantization-aware training; 0: as the recipe says", 0.0, at_least=0)
    label_weight: float = option("of margin softmax of the labels beside the teacher, in distillation", 0.0, at_least=0)
    compute: Compute = option("arithmetic of extraction", "float32")
    engine: Engine = option("what extracts; jax: what was trained, to the last bit", "jax")
    max_seconds: float = option("extraction takes only so much of each recording; 0: all of it", 0.0, at_least=0)
    max_frames: int = option(
        "networks see only so many frames of each, less the mean over all of its frames; 0: all", 0, at_least=0
    )
    quick_compile: bool = option("no optimizations, for networks so tiny that compiling is all they cost", False)
    diagnose: tuple[str, ...] = option("names of the evaluation sets that are diagnosed", ())
    diagnosis: DiagnosisOptions = option("how", DiagnosisOptions())
    calibrate: str = option("name of the evaluation set that cascades are calibrated on", "")
    calibration: CalibrationOptions = option("how", CalibrationOptions())
    cascades: tuple[CascadePlan, ...] = option("cascades to calibrate and to run", ())
    groups: dict[str, tuple[str, ...]] = option("evaluation sets whose mean EER is shown, by the group's name")
    published: dict[str, dict[str, float]] = option("EER in percent, by group and bits (or `cascade`), to compare with")
    published_figures: Json = option("other published figures, see `study.published`")

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: there is no evaluation set, or one is named that there is not.
        """
        super().__post_init__()
        check_max_seconds(self.max_seconds)
        if not self.sets:
            raise UserError("`evaluate` names no evaluation set")
        if len(set(self.bits)) < len(self.bits) or not (self.bits or self.mixed):
            raise UserError(f"`bits` (={shown(self.bits)}) must hold at least one number of bits, and none twice")
        for name, epochs in self.epochs.items():
            if name not in _TRAINED_BY:
                raise UserError(f"`epochs.{name}` (={epochs}) must be of bits (1 to 8, or 32), of mixed or of nested")
            if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs <= 1e6:
                raise UserError(f"`epochs.{name}` (={epochs}) must be a number from 0 to 1000000")
        if self.mixed and not self.epochs.get(MIXED):
            raise UserError(f"`mixed` (={self.mixed}) needs epochs of training: set study.epochs.{MIXED}")
        grouped = [name for members in self.groups.values() for name in members]
        for name in (*self.diagnose, *([self.calibrate] if self.cascades else ()), *grouped):
            if name not in self.sets:
                raise UserError(f"{name!r} is none of the evaluation sets {', '.join(self.sets)}")

    @classmethod
    def of(cls, values: Row, where: str = "study") -> Self:
        """Reads the section `study` of a configuration.

        Args:
            values: the section, as a plain mapping. `evaluate` has `data` and `trials` by name; `cascades` has
                (family, bits) or (family, bits, gates), where the family "trained" stands for the recipe's; `diagnosis`
                and `calibration` have fields of their options.
            where: stands before names in errors.

        Raises:
            UserError: a setting is unknown or has a value that cannot be used.
        """
        given = dict(values)
        given.pop("root", None)  # the directory that places of evaluation sets refer to
        sets = given.pop("evaluate", {})
        given["sets"] = {
            name: EvaluationSet.of({"name": name, **place}, f"{where}.evaluate.{name}") for name, place in sets.items()
        }
        plans = given.pop("cascades", ())
        own = {TRAINED: given.get("recipe", "distilled")}
        given["cascades"] = tuple(
            CascadePlan.of(
                {"family": own.get(family, family), "bits": bits, **({"gates": gates[0]} if gates else {})},
                f"{where}.cascades",
            )
            for family, bits, *gates in plans
        )
        given["diagnosis"] = DiagnosisOptions.of(given.pop("diagnosis", {}), f"{where}.diagnosis")
        given["calibration"] = CalibrationOptions.of(given.pop("calibration", {}), f"{where}.calibration")
        return super().of({"epochs": {}, "groups": {}, "published": {}, "published_figures": {}, **given}, where)
