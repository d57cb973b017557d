"""The options of every benchmark. The first line of a class says what `kmq-jax bench --help` says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmq_jax.cascade.options import BOUNDS, OBJECTIVES
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, draws, option, refuse_given
from kmq_jax.models.choices import Compute, Engine

PEERS = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")
"""Runtimes that extraction is compared with, as `benchmarks.peers.PEERS` has them."""

PARTS = {
    "step": 240.0,
    "qat": 102.0,
    "torch": 70.0,
    "input": 80.0,
    "extract": 80.0,
    "trials": 40.0,
    "kmeans": 60.0,
    "step200": 360.0,
    "remat": 160.0,
}
"""Seconds that each part of `accelerator` may take, the most wanted part first: those that a goal is set for.

On one H200 with an empty cache all but `remat` begin within 480 s by these limits, and all with a goal have their first
figure. Compiling a training step has taken one minute on one machine and over two on another, so the first part has
time for that; later parts find in the cache what earlier ones compiled. ResNet-200 compiles longest and comes late:
what is not reached is named at the end, for a second command.
"""


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """What every benchmark writes."""

    json: Path | None = option("also write the figures to this file", None, writes="file")


@dataclass(frozen=True, kw_only=True)
class Rounds(Bench):
    """What every benchmark of two sides has."""

    repeats: int = option("timed rounds, each side in turn; the median counts", 3, at_least=1, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class ActivationsBench(Bench):
    """What 8-bit activations cost in errors: models beside the same bits with floating-point activations.

    Every model embeds every list; differences of EER come with their paired 95 % interval over draws of speakers.
    --data and --trials may be repeated, as pairs. `tables` writes the JSON as a table of the kind `activations`.
    """

    reference: str = option("full-precision MODEL", metavar="MODEL")
    pair: tuple[str, ...] = option(
        "a name, a MODEL with 8-bit activations, and the one beside it; repeatable", metavar="NAME=MODEL,MODEL"
    )
    data: tuple[str, ...] = option("recordings: any DATA form; once for each list", metavar="DATA")
    trials: tuple[str, ...] = option("trial list, or synthetic:SPLIT; once for each --data", metavar="TRIALS")
    engine: Engine = option("what runs all networks", "auto")
    replicates: int = draws()

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if not self.data or len(self.data) != len(self.trials):
            raise UserError(f"`trials` (={len(self.trials)} given) must be one for each of {len(self.data)} --data")
        if not self.named_pairs:
            raise UserError("`pair` is needed at least once")

    @property
    def named_pairs(self) -> list[tuple[str, str, str]]:
        """Of each pair its name, the model with 8-bit activations, and the one beside it.

        >>> ActivationsBench(reference="f", pair=("W4A8=a.kmq,b.kmq",), data=("d",), trials=("t",)).named_pairs
        [('W4A8', 'a.kmq', 'b.kmq')]

        Raises:
            UserError: one has another form.
        """
        found = []
        for given in self.pair:
            name, _, models = given.partition("=")
            ours, _, beside = models.partition(",")
            if not (name and ours and beside):
                raise UserError(f"`pair` (={given}) must be NAME=MODEL,MODEL")
            found.append((name, ours, beside))
        return found


@dataclass(frozen=True, kw_only=True)
class AcceleratorBench(Options):
    """Speed on an accelerator: training steps, input, extraction, scores; beside PyTorch if installed.

    One JSON line a figure, written as soon as it is known; then a table. Each part runs in a process of its own and is
    stopped at its limit. Parts, the most wanted first:

      step      training step of resnet36 (augmentation and front end on the device), and where its time goes
      qat       the step as KMQAT at 4 and 2 bits beside the step in full precision; then by this project's recipe
      torch     the step of resnet36 in PyTorch
      input     the input pipeline on shards, alone and beside the step
      extract   embedding recordings of VoxCeleb's lengths
      trials    cosine scores, AS-norm, a cascade
      kmeans    k-means of every layer of resnet200
      step200   training step of resnet200, then with its blocks recomputed in the backward pass, by what they keep
      remat     training step of resnet36, its blocks recomputed

    Parts that the time did not suffice for are named at the end, as the `--parts` of a second command.
    """

    out: Path = option("file that lines are appended to", Path("accelerator.jsonl"))
    limit: float = option("seconds in all", 480.0, above=0)
    parts: str = option("which, in order; NAME:SECONDS sets a part's limit", ",".join(PARTS), metavar="NAME,...")
    batch: int = option("examples a step; 0: as many as fit, of 256, 128, 64", 0, at_least=0)
    tiny: bool = option("sizes that a CPU runs in seconds: a rehearsal", False)
    programs: Path | None = option(
        "directory to write the compiled programs of steps to, as text", None, metavar="DIR", writes="directory"
    )
    table: Path | None = option("only print the table of such a file", None)
    part: str | None = option("run one part in this process, without a limit", None, choices=tuple(PARTS))

    @property
    def plan(self) -> list[tuple[str, float]]:
        """The parts to run, and their limits in seconds.

        >>> AcceleratorBench(parts="step:90,trials:60").plan
        [('step', 90.0), ('trials', 60.0)]

        Raises:
            UserError: a part is unknown, or its limit is no number above zero.
        """
        chosen = []
        for word in filter(None, (word.strip() for word in self.parts.split(","))):
            name, _, limit = word.partition(":")
            if name not in PARTS:
                raise UserError(f"`parts`: {name!r} must be one of {', '.join(PARTS)}")
            try:
                seconds = float(limit or PARTS[name])
            except ValueError:
                seconds = 0.0
            if not seconds > 0:
                raise UserError(f"`parts`: {word!r} must be NAME:SECONDS")
            chosen.append((name, seconds))
        return chosen


@dataclass(frozen=True, kw_only=True)
class BiasesBench(Bench):
    """Packed files with biases in float16 beside the same files with biases in float32: bytes, errors, embeddings.

    A network is fitted without training at each number of bits. --data and --trials may be repeated, as pairs. Changes
    have paired 95 % intervals over draws of speakers. `tables` writes the JSON as a table of the kind `biases`.
    """

    model: str = option("full-precision MODEL", metavar="MODEL")
    fit: str = option(
        "DATA whose crops layers are fitted on; left out: weights are rounded as they are", "", metavar="DATA"
    )
    data: tuple[str, ...] = option("recordings: any DATA form; once for each list", metavar="DATA")
    trials: tuple[str, ...] = option("trial list, or synthetic:SPLIT; once for each --data", metavar="TRIALS")
    bits: tuple[int, ...] = option("bits of the files", (4, 3, 2), at_least=1, at_most=8)
    skip: tuple[str, ...] = option("parameters to keep in full precision; repeatable", (), metavar="REGEX")
    engine: Engine = option("what runs the networks", "auto")
    replicates: int = draws()

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if not self.data or len(self.data) != len(self.trials):
            raise UserError(f"`trials` (={len(self.trials)} given) must be one for each of {len(self.data)} --data")
        for place in self.data:  # by which the figures are told apart
            if self.data.count(place) > 1:
                raise UserError(f"`data` (={place}) is given twice: its lists need a run each")


@dataclass(frozen=True, kw_only=True)
class CascadeBench(Rounds):
    """A cascade on a long trial list: seconds, memory; with --stage over random splits of speakers."""

    trials: str = option("how many random trials, or with --stage a trial list", "1000000", metavar="N|TRIALS")
    utterances: int = option("utterances of the random trials", 150_000, at_least=1, at_most=10**7)
    policies: int = option("policies run at once", 32, at_least=1, at_most=10_000)
    repeats: int = option("timed rounds, each side in turn; the median counts", 5, at_least=1, at_most=10_000)
    levels: tuple[str, ...] = option(
        "measure splits of speakers instead; once for each level", (), flag="stage", metavar="BITS:EMBEDDINGS.npz"
    )
    reference: str | None = option("embeddings of the reference, with --stage", None, metavar="FILE")
    splits: int = option("random halvings of the speakers, with --stage", 20, at_least=1, at_most=100_000)
    rule: Literal["pareto", "risk"] = option("with --stage", "pareto")
    alpha: float = option("with --stage: as in `calibrate`", 0.001, above=0, below=1)
    delta: float = option("with --stage: as in `calibrate`", 0.05, above=0, below=1)
    bound: str = option("with --stage: as in `calibrate`", "survey", choices=BOUNDS)
    objective: str = option("with --stage: as in `calibrate`", "flips", choices=OBJECTIVES)

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if self.levels and not self.reference:
            raise UserError("--stage needs --reference")
        if not self.levels and not (self.trials.isdigit() and int(self.trials)):
            raise UserError(f"`trials` (={self.trials}) must be a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class DataBench(Bench):
    """The training pipeline's examples a second, beside a plain loop.

    The loop decodes each file whole, cuts a crop and has no augmentation. The first epoch decodes; later ones
    find lossy and short recordings in memory.
    """

    data: str = option("recordings: any DATA form", "synthetic:dev", metavar="DATA")
    noise: str = option("noise clips: any DATA form", "", metavar="DATA")
    batch: int = option("examples in a batch", 64, at_least=1, at_most=65_536)
    crop_seconds: float = option("length of a crop", 3.5, at_least=0.1, at_most=60)
    threads: int = option("threads of the pipeline", 2, at_least=0, at_most=1024)
    utterances: int = option("how many, evenly over the data", 512, at_least=1)


@dataclass(frozen=True, kw_only=True)
class TrialSizes(Rounds):
    """The size of a random trial list; the defaults are those of VoxCeleb1-E."""

    trials: int = option("trials, half of them targets", 579_818, at_least=1, at_most=10**8)
    utterances: int = option("utterances", 145_375, at_least=1, at_most=10**7)
    speakers: int = option("speakers", 1_251, at_least=10, at_most=10**7)
    replicates: int = option("bootstrap draws of speakers", 1000, at_least=20, at_most=100_000)

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        # With one utterance a speaker, all targets would be an utterance beside itself.
        if self.utterances < 2 * self.speakers:
            raise UserError(f"`utterances` (={self.utterances}) must be at least twice `speakers` (={self.speakers})")


@dataclass(frozen=True, kw_only=True)
class DiagnoseBench(TrialSizes):
    """Every statistic of scores in `diagnose`, on a list of VoxCeleb1-E's size: seconds."""

    models: int = option("quantized models beside the reference", 4, at_least=1, at_most=100)


@dataclass(frozen=True, kw_only=True)
class ExtractBench(Rounds):
    """Extraction of embeddings beside ONNX Runtime on the same recordings, in turns in one run.

    Both sides start from the audio files and end with embeddings. Ours: batches of like length, front end and network
    in one program; compilation is not counted. ONNX Runtime: one utterance after another, as WeSpeaker's own script
    runs it. With --features=ours our front end computes the features of both in batches beforehand, so that the
    networks alone are timed; with --features=own ONNX Runtime's come from kaldi-native-fbank, and decoding and features
    are timed on both sides.

    With --peers several models of ours stand beside the runtimes named, which run the full-precision --reference or
    their own int8 form of it, made from --calibration. Every side embeds recordings one by one, by a worker for each
    processor, from files to embeddings.
    """

    model: str = option(
        "MODEL, such as a directory made by import_model; with --peers several, by commas", metavar="MODEL"
    )
    onnx: Path | None = option("the same model as ONNX, `feats` to `embs`; without --peers", None)
    peers: str = option(f"of {', '.join(PEERS)}; by commas", "", metavar="NAME,...")
    reference: str | None = option("with --peers: the full-precision MODEL that they run", None, metavar="MODEL")
    calibration: str | None = option("with --peers: DATA that int8 forms are made from", None, metavar="DATA")
    data: str = option("recordings: any DATA form", metavar="DATA")
    features: Literal["own", "ours"] = option("whose features ONNX Runtime starts from", "own")
    compute: Compute = option("our network's arithmetic", "float32")
    threads: int = option("of ONNX Runtime", 2, at_least=1, at_most=1024)
    utterances: int = option("how many, evenly over the data; 0: all", 0, at_least=0)

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if unknown := set(self.peer_names) - set(PEERS):
            raise UserError(f"`peers`: {sorted(unknown)[0]!r} must be one of {', '.join(PEERS)}")
        if not self.peers and not self.onnx:
            raise UserError("--onnx is needed, or --peers with --reference")
        if self.peers and not self.peer_names:
            raise UserError(f"`peers` (={self.peers}) must name one of {', '.join(PEERS)}")
        if self.peers and not self.reference:
            raise UserError("--peers needs --reference: the full-precision MODEL that they run")
        if self.peers:
            refuse_given(self, ["onnx", "features", "compute", "threads"], "does not go with `peers`")
            _ = self.named_models
        else:
            refuse_given(self, ["reference", "calibration"], "needs `peers`")

    @property
    def peer_names(self) -> list[str]:
        """The peers, in order."""
        return list(filter(None, (name.strip() for name in self.peers.split(","))))

    @property
    def named_models(self) -> dict[str, str]:
        """With `peers`: every MODEL of ours by the name that tables show.

        Raises:
            UserError: two would have the same.
        """
        places = self.model.split(",")
        named = {f"ours, {Path(place).stem}": place for place in places}
        if len(named) < len(places):
            raise UserError(f"`model` (={self.model}) must name files of different names")
        return named


@dataclass(frozen=True, kw_only=True)
class FrontendBench(Rounds):
    """Filterbank features beside kaldi-native-fbank: speed and difference; cost of augmentation.

    Ours runs in batches on all cores, compilation not counted; kaldi-native-fbank as it is called from Python, one
    utterance after another on one core.
    """

    data: str = option("audio: any DATA form", "synthetic:dev", metavar="DATA")
    utterances: int = option("how many, evenly over the data", 64, at_least=1)
    batch: int = option("utterances in a batch", 16, at_least=1, at_most=4096)
    repeats: int = option("timed rounds, each side in turn; the median counts", 7, at_least=1, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class QatBench(Rounds):
    """What quantization adds to a training step: the step in full precision and with codebooks, in turns."""

    model: str = option("network, by its registry name", "resnet36")
    bits: tuple[int, ...] = option("bits to compare with full precision", (4, 2), at_least=1, at_most=8)
    batch: int = option("utterances in a batch", 16, at_least=1, at_most=4096)
    frames: int = option("frames of an utterance", 200, at_least=1, at_most=100_000)
    dtype: Compute = option("compute dtype; parameters are float32", "float32")
    repeats: int = option("timed steps of each", 5, at_least=1, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class LazyBench(Rounds):
    """A cascade from recordings beside single models for all of them: seconds, multiplications, bytes, errors.

    The cascade embeds every recording at its first level and only those in doubt at the next. Where a list uses each
    recording in many trials, as evaluation lists do, nearly all of them are in doubt somewhere; --uses=1 thins the list
    to trials of fresh recordings, as a service sees them. Compilation is not counted. --data and --trials may be
    repeated, as pairs: in and out of domain. With several --cascade their seconds tell which levels to take. `tables`
    writes the JSON as a table of the kind `lazy`.
    """

    cascade: tuple[str, ...] = option("directory of a policy and its models; repeatable", metavar="DIR")
    reference: str | None = option("full-precision MODEL; left out: the first cascade's last", None, metavar="MODEL")
    data: tuple[str, ...] = option("recordings: any DATA form; once for each list", metavar="DATA")
    trials: tuple[str, ...] = option("trial list, or synthetic:SPLIT; once for each --data", metavar="TRIALS")
    uses: int = option("trials that a recording takes part in at most; 0: all", 1, at_least=0)
    compute: Compute = option(
        "arithmetic of cascades below their last level, bfloat16 is JAX's; single models are run in float32", "bfloat16"
    )
    engine: Engine = option("what runs all networks", "jax")
    beside: tuple[str, ...] = option("more MODELs for all recordings, such as 2, 4 bits, W8A8", (), metavar="MODEL")

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if self.engine == "onnxruntime" and self.compute != "float32":
            raise UserError("--engine=onnxruntime needs --compute=float32: integers are the model's own")
        if not self.data or len(self.data) != len(self.trials):
            raise UserError(f"`trials` (={len(self.trials)} given) must be one for each of {len(self.data)} --data")
        if len({"cascade", "full precision", *self.beside}) < 2 + len(self.beside):
            raise UserError("`beside` names a model twice")
        if not self.cascade or len({Path(place).name for place in self.cascade}) < len(self.cascade):
            raise UserError("`cascade` is needed, and none by another's name")


@dataclass(frozen=True, kw_only=True)
class AcrossBench(Rounds):
    """Cascades of different networks, gates chosen by measured seconds, beside single models: seconds, errors, bytes.

    Each first model makes a cascade with the last; both stand in the table alone too. BITS only put levels in order.
    All are timed on the same recordings, in turns; compilation is not counted. The first list calibrates maps,
    threshold and gates, for itself crosswise: each half of its speakers is decided by what the other half gives. --data
    and --trials may be repeated, as pairs. `tables` writes the JSON as a table of the kind `across`.
    """

    first: tuple[str, ...] = option("a first model; once for each cascade", repeat=True, metavar="BITS:MODEL")
    last: str = option("the model that decides what is in doubt, and that changes are against", metavar="BITS:MODEL")
    beside: tuple[str, ...] = option("more MODELs, alone", (), metavar="MODEL")
    data: tuple[str, ...] = option("recordings: any DATA form; once for each list", metavar="DATA")
    trials: tuple[str, ...] = option("trial list, or synthetic:SPLIT; once for each --data", metavar="TRIALS")
    kept: Path = option(
        "embedding files of whole recordings: read where they are of a model and its data, else written",
        metavar="DIR",
        writes="directory",
    )
    alpha: tuple[float, ...] = option("harmful flips a trial that gates may make; several", (0.005,), above=0, below=1)
    cost: Literal["sequential", "utterance"] = option(
        "what gates keep low: seconds of a trial's tested recording, or of all recordings of the list", "sequential"
    )
    recordings: int = option("of each list that are timed", 24, at_least=1)
    replicates: int = draws()
    engine: Engine = option("what runs all networks", "auto")

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if not self.first or not self.alpha:
            raise UserError("`first` and `alpha` need a value")
        if not self.data or len(self.data) != len(self.trials):
            raise UserError(f"`trials` (={len(self.trials)} given) must be one for each of {len(self.data)} --data")


@dataclass(frozen=True, kw_only=True)
class MemoryBench(Bench):
    """The paper's memory table, every cell: what its two networks weigh as they are packed here.

    Counted on shapes, in MiB; nothing is trained. `tables` writes the JSON as a table of the kind `memory`.
    """

    biases: Literal["float16", "float32"] = option("the type of biases of convolutions and linear layers", "float16")


@dataclass(frozen=True, kw_only=True)
class NetworksBench(Bench):
    """Every network: parameters and arithmetic beside its source's, and the time of an embedding.

    Each network takes turns with wespeaker_resnet34, on a recording of noise and with random weights, on all
    processors. Time is told as a ratio, and as that ratio times the reference's median over all turns. Compilation and
    conversion are not counted.
    """

    network: tuple[str, ...] = option("one of the registry, by its name; repeatable; left out: all", (), metavar="NAME")
    seconds: float = option("of the recording that is embedded", 3.0, at_least=0.5, at_most=3600)
    engine: Engine = option("what runs the networks; those without an ONNX form run on JAX with auto", "auto")
    repeats: int = option("timed rounds; 0: count only", 9, at_least=0, at_most=10_000)
    tiny: bool = option("the networks' smallest forms: a rehearsal", False)


@dataclass(frozen=True, kw_only=True)
class QuantBench(Rounds):
    """k-means of every layer of a network beside scikit-learn and a sort; speed of quantization."""

    network: str = option("whose kernels' shapes are clustered", "resnet200")
    bits: int = option("bits of the indices", 4, at_least=1, at_most=8)
    channels: int = option("channels a layer that scikit-learn clusters", 2, at_least=1)
    layers: int = option("take only so many layers; 0: all", 0, at_least=0)
    step: bool = option("also time a training step, quantized and not (minutes)", False)


@dataclass(frozen=True, kw_only=True)
class ScoreBench(TrialSizes):
    """Scoring and evaluating a long trial list beside numpy and scikit-learn: time and memory."""

    dim: int = option("dimensions of an embedding", 256, at_least=1, at_most=65_536)
    spread: float = option("of utterances about their speaker: sets the EER", 2.2, above=0)


STREAMED = ("score", "snorm", "cascade")
"""Commands that `stream` measures."""


@dataclass(frozen=True, kw_only=True)
class StreamBench(Bench):
    """Trial lists of any length by `score --stream` and `cascade --stream`: seconds, peak memory, processes.

    A list is made on disk (about 30 bytes a trial), and embeddings at 2, 3, 4 bits and of a reference. Each command
    then runs in one process and in several that share the list; what these find must be the same. `snorm` is `score`
    with adaptive S-norm. Needs a POSIX system. `tables` writes the JSON as a table of the kind `stream`.
    """

    trials: int = option("trials, half of them targets", 10**8, at_least=100, at_most=10**10)
    utterances: int = option("utterances", 145_375, at_least=1, at_most=10**7)
    speakers: int = option("speakers", 1_251, at_least=2, at_most=10**7)
    dim: int = option("dimensions of an embedding", 256, at_least=1, at_most=65_536)
    spread: float = option("of utterances about their speaker: sets the EER", 2.2, above=0)
    cohort: int = option("embeddings of the cohort, for snorm", 6_000, at_least=2, at_most=10**6)
    commands: tuple[str, ...] = option("which, by commas", STREAMED, choices=STREAMED)
    processes: int = option("processes that share the list in the second run of each; 1: none", 2, at_least=1)
    directory: Path | None = option("where the list is made, and removed; left out: the system's place", None)

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if self.utterances < 2 * self.speakers:
            raise UserError(f"`utterances` (={self.utterances}) must be at least twice `speakers` (={self.speakers})")


@dataclass(frozen=True, kw_only=True)
class TrainBench(Rounds):
    """One training step of wespeaker_resnet34 beside PyTorch: forward and backward with AAM softmax.

    Each side runs in a process of its own and takes turns with the others, so that a busy machine slows all alike.
    PyTorch is tried in both of its memory layouts, and compared by the faster one. Without PyTorch ours is measured
    alone.
    """

    peer: Literal["torch", "none"] = option("what to run beside ours", "torch")
    dtype: Compute = option("compute dtype; parameters are float32", "float32")
    batch: int = option("utterances in a batch", 16, at_least=1, at_most=4096)
    frames: int = option("frames of an utterance", 200, at_least=1, at_most=100_000)
    threads: int = option("CPU threads of each side", 2, at_least=1, at_most=1024)
    repeats: int = option("timed steps of each side", 7, at_least=1, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class PodsBench(Bench):
    """Data-parallel training on paper: what a step sends by XLA's program, and seconds a step on TPU slices and GPUs.

    Reckoned from datasheets and from what a step was measured to do on one card; nothing is timed. A --json that ends
    in .jsonl gets a line; `tables` writes them, each of its kind the newest.
    """

    model: str = option("a name of the registry", "resnet36")
    bits: int = option("codebooks of so many bits; 0: full precision", 0, at_least=0, at_most=8)
    remat: bool = option("blocks are recomputed in the backward pass", False)
    sharding: str = option("regular expression: such parameters are split along their first axis; `classifier`", "")
    batch: int = option("examples a chip; halved until its memory holds them", 256, at_least=1, at_most=65_536)
    measured: Path | None = option(
        "file of `bench accelerator`: shares of peak, passes over memory and its size, of this network", None
    )
    share: float = option("of a chip's peak that a step runs at, without --measured", 0.4, above=0)
    devices: int = option("simulated devices that the step is compiled for", 4, at_least=1, at_most=64)
    tiny: bool = option("the network's smallest form: a rehearsal", False)


BENCHMARKS: dict[str, type[Options]] = {
    "accelerator": AcceleratorBench,
    "across": AcrossBench,
    "activations": ActivationsBench,
    "biases": BiasesBench,
    "cascade": CascadeBench,
    "data": DataBench,
    "diagnose": DiagnoseBench,
    "extract": ExtractBench,
    "frontend": FrontendBench,
    "qat": QatBench,
    "lazy": LazyBench,
    "memory": MemoryBench,
    "networks": NetworksBench,
    "pods": PodsBench,
    "quant": QuantBench,
    "score": ScoreBench,
    "stream": StreamBench,
    "train": TrainBench,
}
"""Every benchmark's options; the benchmark itself is `main(options)` of the module of that name beside this one."""
