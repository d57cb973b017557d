"""Options of extraction and scoring."""

from dataclasses import dataclass

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, draws, option
from kmq_jax.models.choices import Compute, Engine

LEAST_SECONDS = 0.1
"""The shortest recording allowed, `data.audio.MIN_SECONDS`: repeated here because that module is slow to import."""


def check_max_seconds(seconds: float) -> None:
    """Refuses to cut recordings so short that one frame is left: less its own mean, it is zero whoever speaks.

    Args:
        seconds: the option `max_seconds`; 0 cuts nothing.

    Raises:
        UserError: it lies between 0 and `LEAST_SECONDS`.

    >>> check_max_seconds(0), check_max_seconds(3.0)
    (None, None)
    """
    if 0 < seconds < LEAST_SECONDS:
        raise UserError(f"`max_seconds` (={seconds:g}) must be 0, which takes all, or at least {LEAST_SECONDS:g}")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """How a model is read and run, by whatever command embeds with it."""

    bits: int | None = option(
        "bits at which a nested model is read; left out: the most it has", None, at_least=1, at_most=64
    )
    engine: Engine = option("auto: ONNX Runtime on a CPU, JAX on a GPU or TPU", "auto")


@dataclass(frozen=True, kw_only=True)
class HearOptions(RunOptions):
    """As `RunOptions`, and which part of a recording is embedded."""

    vad: bool = option("leave out what is not speech, and say how much was used", False)


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions(HearOptions):
    """How recordings are embedded."""

    compute: Compute = option("the network's arithmetic", "float32")
    max_seconds: float = option("only so much of each recording, its mean as well; 0: all of it", 0.0, at_least=0)
    max_frames: int = option(
        "the network sees only so many frames of each, less the mean over all of its frames; 0: all", 0, at_least=0
    )
    batch_size: int = option("recordings in one batch of JAX", 16, at_least=1, at_most=4096)

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: "`name` (=value) must be ...".
        """
        super().__post_init__()
        check_max_seconds(self.max_seconds)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """How a trial list is scored and evaluated."""

    cohort_speaker_means: bool = option("S-norm: one cohort member a speaker, the mean of its embeddings", False)
    top_n: int | None = option(
        "S-norm: nearest cohort members that count; left out: 300, or all if fewer", None, at_least=2
    )
    p_target: float = option("prior of a target, for minDCF and actDCF", 0.01, above=0, below=1)
    replicates: int = draws()
    stream: bool = option(
        "read the list part by part, in bounded memory: EER and minDCF from a histogram, with bounds and without "
        "intervals. Processes that are started together share the list",
        False,
    )
    seed: int = option("of the bootstrap and of the calibration folds", 0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(HearOptions):
    """Which threshold is wanted, and how recordings are embedded for it."""

    false_accept: float = option(
        "the share of comparisons of two speakers that may be accepted, a fraction", 0.01, above=0, below=1
    )
    replicates: int = option("bootstrap draws of speakers", 1000, at_least=100, at_most=10_000)
    seed: int = option("of the bootstrap", 0, at_least=0)
