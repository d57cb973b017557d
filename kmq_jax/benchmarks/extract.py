"""Extraction of embeddings beside ONNX Runtime on the same recordings, in turns in one run: seconds and their ratio."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.benchmarks import peers
from kmq_jax.benchmarks.frontend import kaldi_fbank
from kmq_jax.benchmarks.options import ExtractBench
from kmq_jax.benchmarks.timing import REST, Figures, in_turns, medians, processors, write_figures
from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.files import write_json
from kmq_jax.data import buckets, source
from kmq_jax.models.runner import packed_file
from kmq_jax.models.speaker_model import BATCH_SIZE, SpeakerModel, embed_all, embed_waves, frontend_of, load_model


def session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Opens an ONNX file; gives the function from features `[batch, frames, features]` to embeddings.

    Raises:
        UserError: ONNX Runtime is not installed, or cannot open the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX Runtime is not installed: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise UserError(f"`onnx` (={path}) cannot be opened by ONNX Runtime: {first_line(error)}") from error
    feed = opened.get_inputs()[0].name
    return lambda feats: opened.run(None, {feed: feats})[0]


def subset(utterances: source.Utterances, count: int) -> source.Utterances:
    """Takes `count` utterances, evenly over the table; 0 takes all."""
    if not count or count >= len(utterances):
        return utterances
    return utterances.select(np.linspace(0, len(utterances) - 1, count).astype(int))


def own_features(utterances: source.Utterances, fbank: frontend.FrontEnd, i: int) -> np.ndarray:
    """Decodes an utterance; its mean-normalised features by kaldi-native-fbank, `[1, frames, features]`."""
    features = kaldi_fbank(utterances.load(i), fbank)
    return (features - features.mean(axis=0))[None]


@functools.partial(jax.jit, static_argnums=0)
def _features(fbank: frontend.FrontEnd, wave: jax.Array, samples: jax.Array) -> jax.Array:
    return frontend.features_of(wave, fbank, samples)


@functools.partial(jax.jit, static_argnums=0)
def _network(network, variables, features: jax.Array, frames: jax.Array) -> jax.Array:
    return network.apply(variables, features, frames, train=False)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`, in double precision.

    >>> cosines(np.array([[1, 0], [3, 4]]), np.array([[2, 0], [4, -3]])).tolist()
    [1.0, 0.0]
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def compare(
    speaker_model: SpeakerModel,
    onnx: Callable[[np.ndarray], np.ndarray],
    utterances: source.Utterances,
    features: str,
    compute: str,
    repeats: int,
) -> dict[str, float]:
    """Times both sides in turns, after one round that is not counted, and compares their embeddings.

    Returns:
        Median seconds of each side, `speedup` of ours over ONNX Runtime, seconds of audio, and the least and mean
        cosine between the two sides' embeddings of an utterance.
    """
    fbank = frontend_of(speaker_model.frontend)
    if features == "own":

        def ours() -> np.ndarray:
            return embed_all(speaker_model, utterances, compute)

        def theirs() -> np.ndarray:
            return np.concatenate([onnx(own_features(utterances, fbank, i)) for i in range(len(utterances))])
    else:
        ours, theirs = _on_our_features(speaker_model, onnx, utterances, compute)
    median = medians(in_turns({"ours": ours, "onnx": theirs}, repeats))
    cosine = cosines(ours(), theirs())
    return {
        "ours_seconds": median["ours"],
        "onnx_seconds": median["onnx"],
        "speedup": median["onnx"] / median["ours"],
        "audio_seconds": float(utterances.lengths().sum() / source.SAMPLE_RATE),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
    }


def _on_our_features(
    speaker_model: SpeakerModel,
    onnx: Callable[[np.ndarray], np.ndarray],
    utterances: source.Utterances,
    compute: str,
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Computes features of all once; gives the two sides that start from them."""
    fbank, network = frontend_of(speaker_model.frontend), speaker_model.network(compute)
    lengths = utterances.lengths()
    frames = np.asarray(frontend.num_frames(lengths, fbank))
    batches = []
    for batch in buckets.length_buckets(lengths, min(BATCH_SIZE, len(lengths))):
        members = batch.indices[batch.indices >= 0]  # -1 marks a row that only fills up the batch
        wave = np.zeros((len(batch.indices), batch.size), np.float32)
        samples = np.full(len(batch.indices), batch.size, np.int32)
        for row, i in enumerate(members):
            wave[row, : lengths[i]], samples[row] = utterances.load(i), lengths[i]
        # Copied once, so that ours does not start from an array that the device already holds.
        batches.append((members, np.array(_features(fbank, wave, samples)), frontend.num_frames(samples, fbank)))
    # Of each recording `[1, frames, features]`, without its padding.
    single = {
        i: np.ascontiguousarray(rows[row, : frames[i]][None])
        for members, rows, _ in batches
        for row, i in enumerate(members.tolist())
    }
    variables = jax.device_put(quant.dequantize_params(speaker_model.variables, speaker_model.bits))

    def ours() -> np.ndarray:
        embeddings = np.zeros((len(lengths), network.embedding_size), np.float32)
        for members, rows, real in batches:
            embeddings[members] = np.asarray(_network(network, variables, rows, real))[: len(members)]
        return embeddings

    return ours, lambda: np.concatenate([onnx(single[i]) for i in range(len(lengths))])


def file_bytes(place: str) -> int:
    """Bytes of the `.kmq` file that a MODEL is read from; of one that has none, what its tensors take."""
    file = packed_file(place)
    return file.stat().st_size if file else quant.size_bytes(load_model(place).variables).total


def dealt(utterances: source.Utterances, count: int, rounds: int) -> list[source.Utterances]:
    """Deals utterances into `rounds` tables that share none, each spread over the whole table.

    Args:
        utterances: as many as `rounds` or more.
        count: of each table, at most; 0 deals all.
        rounds: how many tables.

    Raises:
        UserError: there are fewer utterances than rounds.
    """
    if len(utterances) < rounds:
        raise UserError(f"`data`: {len(utterances)} recordings are too few for {rounds} rounds, `repeats` and one more")
    taken = subset(utterances, count * rounds)
    return [taken.select(np.arange(i, len(taken), rounds)) for i in range(rounds)]


def _ratios(seconds: dict[str, list[float]], first: str) -> dict[str, list[float]]:
    """How many times as fast as the side `first` each is, round by round."""
    return {
        name: [of_first / own for of_first, own in zip(seconds[first], times, strict=True)]
        for name, times in seconds.items()
    }


def beside_peers(options: ExtractBench) -> Figures:
    """Models of ours and peers, in turns; what each takes relative to the first peer, and how near it comes.

    Every round takes other recordings, as a service does: some runtimes prepare for each length, and would be timed on
    lengths that they know. Then the last round's recordings are repeated.

    Returns:
        `sides`, a list of rows: name, bytes, median `speedup` over the first side named in `peers` round by round, its
        least and most in one round, `speedup_again` on recordings run before, mean and least cosine to the
        full-precision reference's embeddings, and milliseconds for one recording of 2.5 s, warm; `rounds`, how many;
        `utterances` and `audio_seconds` of the last.
    """
    peers.check(options.peer_names, options.calibration is not None)
    reference = load_model(str(options.reference))
    fbank = frontend_of(reference.frontend)
    parts = dealt(source.open_source(options.data), options.utterances, 1 + options.repeats)  # one to warm up
    calibration = source.open_sources(options.calibration) if options.calibration else None
    sides: dict[str, Callable[[source.Utterances], np.ndarray]] = {}
    single: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    # The beginning of the longest recording: others may be shorter than 2.5 s.
    last = parts[-1]
    short = last.load(int(np.argmax(last.lengths())))[: int(2.5 * source.SAMPLE_RATE)]
    for name in options.peer_names:
        run, sizes[name] = peers.peer(name, reference, calibration)
        sides[name] = functools.partial(peers.embed_all, run, fbank=fbank)
        # `partial` binds this `run`; a plain lambda would see the last peer's.
        single[name] = functools.partial(lambda run: run(peers.features(short, fbank)), run)
    for name, place in options.named_models.items():
        model = load_model(place)
        sizes[name] = file_bytes(place)
        sides[name] = functools.partial(embed_all, model, engine="onnxruntime")
        single[name] = functools.partial(embed_waves, model, [short], engine="onnxruntime")
    first = options.peer_names[0]
    new = in_turns({name: _each_once(side, parts) for name, side in sides.items()}, options.repeats, alternate=True)
    # Two rounds to warm up: what a runtime prepares for a length, each of its streams may have to prepare.
    same = {name: functools.partial(side, last) for name, side in sides.items()}
    again = in_turns(same, options.repeats, warm_up=2, alternate=True)
    alone = medians(in_turns(single, 5 * options.repeats, warm_up=2, rest=REST))
    speedups, speedups_again = _ratios(new, first), _ratios(again, first)
    exact = embed_all(reference, last, engine="onnxruntime")
    rows = []
    for name, side in sides.items():
        near = cosines(side(last), exact)
        rows.append(
            {
                "side": name,
                "bytes": sizes[name],
                "speedup": statistics.median(speedups[name]),
                "speedup_range": [min(speedups[name]), max(speedups[name])],
                "speedup_again": statistics.median(speedups_again[name]),
                "milliseconds_alone": 1000 * alone[name],
                "mean_cosine": float(near.mean()),
                "min_cosine": float(near.min()),
            }
        )
    audio_seconds = float(last.lengths().sum() / source.SAMPLE_RATE)
    about = {"utterances": len(last), "audio_seconds": audio_seconds, "rounds": options.repeats}
    return {"processors": processors(), **about, "sides": rows}


def _each_once(
    run: Callable[[source.Utterances], np.ndarray], parts: list[source.Utterances]
) -> Callable[[], np.ndarray]:
    """Runs the next part at each call."""
    left = iter(parts)
    return lambda: run(next(left))


def peers_main(options: ExtractBench) -> None:
    """Prints the comparison with peers."""
    figures = {"data": options.data, **beside_peers(options)}
    for row in figures["sides"]:
        least, most = row["speedup_range"]
        print(
            f"{row['side']:24} {row['bytes'] / 1e6:6.2f} MB  x {row['speedup']:.2f} ({least:.2f} to {most:.2f}), "
            f"again x {row['speedup_again']:.2f}  2.5 s alone {row['milliseconds_alone']:.0f} ms  "
            f"cosine {row['mean_cosine']:.4f}"
        )
    if options.json:
        write_json(options.json, figures)


def main(options: ExtractBench) -> None:
    """Prints the comparison."""
    if options.peers:
        peers_main(options)
        return
    assert options.onnx is not None
    if options.features == "own":
        try:
            import kaldi_native_fbank  # noqa: F401
        except ImportError:
            raise UserError("kaldi-native-fbank is not installed: pip install 'kmq_jax[test]'") from None
    onnx = session(options.onnx, options.threads)
    utterances = subset(source.open_source(options.data), options.utterances)
    found = compare(load_model(options.model), onnx, utterances, options.features, options.compute, options.repeats)
    figures = {"features": options.features, "compute": options.compute, "threads": options.threads, **found}
    print(
        f"{len(utterances)} utterances, {figures['audio_seconds']:.0f} s of audio, features: {options.features}\n"
        f"ours ({options.compute}) {figures['ours_seconds']:.2f} s, "
        f"ONNX Runtime ({options.threads} threads) {figures['onnx_seconds']:.2f} s: "
        f"{figures['speedup']:.2f} times as fast\n"
        f"cosine between them: least {figures['min_cosine']:.7f}, mean {figures['mean_cosine']:.7f}"
    )
    if options.json:
        write_figures(options.json, "extract", {"data": options.data, "utterances": len(utterances), **figures})
