"""Every network in one table: parameters and arithmetic beside those of its source, and time beside ResNet34's."""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import numpy as np

from kmq_jax.benchmarks.options import NetworksBench
from kmq_jax.benchmarks.timing import REST, Figures, in_turns, medians
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Leaf, map_named, named_leaves
from kmq_jax.models import registry
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.speaker_model import FRONTENDS, SpeakerModel, embed_waves

REFERENCE = "wespeaker_resnet34"
FRAMES = 300
PRINTED_FRAMES = 200  # two seconds, of WeSpeaker's README and of the paper on ReDimNet


@dataclasses.dataclass(frozen=True)
class Source:
    """What the original of a network counts.

    Attributes:
        toolkit: whose it is.
        parameters: their exact number, or millions as printed.
        giga: multiply-accumulates in 10^9 as printed, for `frames` frames; None where none are known.
        frames: of an utterance.
        more: parameters there that have no place here.
        why: what `more` is, or why multiply-accumulates differ.
        printed: millions of parameters and 10^9 multiply-accumulates of `PRINTED_FRAMES` that its README or paper
            prints, where these are not what its code counts; empty where it prints none.
    """

    toolkit: str
    parameters: int | str
    giga: str | None = None
    frames: int = FRAMES
    more: int = 0
    why: str = ""
    printed: tuple[str, ...] = ()


_ONE = "the weight of the first stage's only input, a constant 1"
SOURCES = {
    "resnet18": Source("Kiwano", "8.04", "22.4"),
    "resnet36": Source("Kiwano", "14.93", "41.15"),
    "resnet50": Source("Kiwano", "15.64", "43.5"),
    "resnet101": Source("Kiwano", "36.83", "76.8"),
    "resnet200": Source("Kiwano", "59.94", "140.6"),
    "wespeaker_resnet18": Source("WeSpeaker", 4_105_440, "3.263"),
    "wespeaker_resnet34": Source("WeSpeaker", 6_634_336, "6.808", printed=("6.63", "4.55")),
    "wespeaker_resnet50": Source("WeSpeaker", 11_131_360, "7.624"),
    "wespeaker_resnet101": Source("WeSpeaker", 15_892_448, "14.727"),
    "wespeaker_resnet152": Source("WeSpeaker", 19_814_880, "21.829"),
    "wespeaker_resnet221": Source("WeSpeaker", 23_792_224, "31.438", printed=("23.79", "21.29")),
    "wespeaker_resnet293": Source("WeSpeaker", 28_626_016, "41.465", printed=("28.62", "28.10")),
    "ecapa_c512": Source("WeSpeaker", 6_190_720, "1.555", printed=("6.19", "1.04")),
    "ecapa_c1024": Source("WeSpeaker", 14_657_088, "3.973", printed=("14.65", "2.65")),
    "ecapa_speechbrain_c512": Source("SpeechBrain", 6_194_048, "1.555"),
    "ecapa_speechbrain_c1024": Source("SpeechBrain", 20_767_552, "5.625"),
    "redimnet_b0": Source("WeSpeaker", 1_001_851, "0.61", 200, 1, _ONE, printed=("1.0", "0.43")),
    "redimnet_b1": Source("WeSpeaker", 2_123_481, "0.88", 200, 1, _ONE, printed=("2.2", "0.54")),
    "redimnet_b2": Source("WeSpeaker", 4_888_241, "1.36", 200, 1, _ONE, printed=("4.7", "0.90")),
    "redimnet_b3": Source("WeSpeaker", 3_220_413, "4.34", 200, 1, _ONE, printed=("3.0", "3.00")),
    "redimnet_b4": Source("WeSpeaker", 6_432_305, "7.05", 200, 1, _ONE, printed=("6.3", "4.80")),
    "redimnet_b5": Source("WeSpeaker", 7_650_545, "13.14", 200, 1, _ONE, printed=("9.2", "9.87")),
    "redimnet_b6": Source("WeSpeaker", 15_006_257, "30.0", 200, 1, _ONE, printed=("15.0", "20.27")),
    "xvector": Source("WeSpeaker", 4_610_524, "0.812", printed=("4.61", "0.53")),
    "campplus": Source(
        "WeSpeaker, 3D-Speaker",
        7_176_224,
        "1.689",
        why="one context a segment, there one a frame",
        printed=("7.18", "1.15"),
    ),
    "ge2e": Source("Resemblyzer", 1_423_616, more=3_072, why="two biases a gate, here their sum"),
}
"""Counts of the originals: of PyTorch's modules made by their code, convolutions and linear layers counted by hooks; of
Kiwano's those that their paper prints. What WeSpeaker's README prints counts four operations for each normalised value
as well. What the paper on ReDimNet prints is of tables and a hop of its own."""


def counts(name: str, network: SpeakerNetwork, source: Source | None) -> Figures:
    """A network's counts, and whether they are its source's."""
    leaves = named_leaves(registry.shapes(network)["params"])
    kernels = [leaf.size for _, leaf in leaves if leaf.ndim > 1]
    parameters = sum(leaf.size for _, leaf in leaves)
    macs = functools.cache(functools.partial(registry.macs, network))  # a walk for each number of frames
    figures: Figures = {
        "network": name,
        "features": network.features,
        "embedding_size": network.embedding_size,
        "parameters": parameters,
        "kernels": len(kernels),
        "weights": sum(kernels),
        "macs": macs(FRAMES),
    }
    if source is None:
        return figures
    there = parameters + source.more  # what the source would count
    same = there == source.parameters or f"{there / 1e6:.2f}" == source.parameters
    figures |= {"source": source.toolkit, "source_parameters": source.parameters, "source_has_more": source.more}
    figures |= {"parameters_as_source": same, "source_gmacs": source.giga, "source_frames": source.frames}
    if source.giga is not None:
        own = macs(source.frames) / 1e9
        figures["gmacs_as_source"] = f"{own:.{len(source.giga.partition('.')[2])}f}" == source.giga
    if source.printed:
        figures |= dict(zip(("printed_parameters", "printed_gmacs"), source.printed))
        figures |= {"printed_frames": PRINTED_FRAMES, "macs_of_printed_frames": macs(PRINTED_FRAMES)}
    return figures | ({"why": source.why} if source.why else {})


def front_end_of(network: SpeakerNetwork) -> str:
    """The front end of a network by name: that of its layout, or the first that gives as many features.

    >>> front_end_of(registry.build("ge2e")), front_end_of(registry.build("ecapa_speechbrain_c512"))
    ('resemblyzer', 'speechbrain')
    """
    layout = getattr(network, "layout", None)
    if layout in FRONTENDS:
        return str(layout)
    return next(name for name, fbank in FRONTENDS.items() if fbank.num_features == network.features)


def embedder(name: str, settings: Figures, options: NetworksBench) -> Callable[[], object]:
    """Embeds a recording by a network of random weights, drawn without compiling what training starts from."""
    network, rng = registry.build(name, **settings), np.random.default_rng(0)

    def draw(name: str, leaf: Leaf) -> np.ndarray:
        if leaf.ndim < 2:  # scales and variances are 1, biases and means 0
            return np.full(leaf.shape, name.endswith(("/scale", "/var")), np.float32)
        # Over the fan-in, so that activations neither grow nor vanish.
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(leaf.size / leaf.shape[-1]))

    model = SpeakerModel(name, settings, front_end_of(network), map_named(draw, registry.shapes(network)))
    wave = 0.05 * rng.standard_normal(round(options.seconds * 16000), np.float32)
    return lambda: embed_waves(model, [wave], engine=options.engine)


def measure(options: NetworksBench) -> Figures:
    """The figures of every network, each timed in turns with the reference.

    `time_of_reference` is the ratio of the two medians of those turns. `seconds` is that ratio times
    `reference_seconds`, the reference's median over the turns of all networks. So the two agree, and a machine that
    was slower for a while lengthens no network's seconds alone.
    """
    chosen = options.network or tuple(SOURCES)  # not the graph of an ONNX file, which is nothing without the file
    for name in chosen:
        registry.default_settings(name)  # a misspelt name is told before the work
    settings = {name: registry.smoke_settings(name) if options.tiny else {} for name in {*chosen, REFERENCE}}
    reference = embedder(REFERENCE, settings[REFERENCE], options) if options.repeats else None
    rows, calls = [], list[float]()
    for name in progress(list(chosen), desc="networks", unit="network"):
        source = None if options.tiny else SOURCES.get(name)
        row = counts(name, registry.build(name, **settings[name]), source)
        if reference is not None:
            sides = {REFERENCE: reference}
            if name != REFERENCE:
                sides[name] = embedder(name, settings[name], options)
            seconds = in_turns(sides, options.repeats, alternate=True, rest=REST)
            calls += seconds[REFERENCE]
            middle = medians(seconds)
            row["time_of_reference"] = middle[name] / middle[REFERENCE]
        rows.append(row)
    about = {"frames": FRAMES, "seconds": options.seconds, "engine": options.engine, "repeats": options.repeats}
    if calls:
        about["reference_seconds"] = statistics.median(calls)
        for row in rows:
            row["seconds"] = row["time_of_reference"] * about["reference_seconds"]
    return {"kind": "networks", "reference": REFERENCE, **about, "rows": rows}


def main(options: NetworksBench) -> None:
    """Prints the table."""
    figures = measure(options)
    longest = max(len(row["network"]) for row in figures["rows"])
    head = f"{'parameters':>12} {'as source':>10} {'GMAC':>8} {'source':>8} {'time of ' + REFERENCE:>28} {'seconds':>8}"
    print(f"{'network':{longest}} {head}")
    for row in figures["rows"]:
        same = {True: "yes", False: "no", None: ""}[row.get("parameters_as_source")]
        time = f"{row['time_of_reference']:.2f}" if "time_of_reference" in row else ""
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else ""
        there = row.get("source_gmacs") or ""
        print(
            f"{row['network']:{longest}} {row['parameters']:>12,} {same:>10} {row['macs'] / 1e9:8.3f} {there:>8} "
            f"{time:>28} {seconds:>8}"
        )
    if options.json:
        write_json(options.json, figures)
    if wrong := [row["network"] for row in figures["rows"] if row.get("parameters_as_source") is False]:
        raise UserError(f"{', '.join(wrong)}: parameters are not those of the source")
