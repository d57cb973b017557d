"""A speaker model: network, front end and weights; recordings in, embeddings out."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from kmq_jax import frontend, quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row, read_object
from kmq_jax.core.hub import fetch, is_place
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Array, Leaf, Variables, named_leaves, replace_named
from kmq_jax.data import audio, buckets, source
from kmq_jax.models import artifact, long, registry
from kmq_jax.models.about import About, checked
from kmq_jax.models.batches import check_lengths, padded_batches, plan_batches, usable_lengths
from kmq_jax.models.choices import Engine
from kmq_jax.models.engine import OnnxModel, chosen, note_of
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.runner import Note, check_process, kept_file, packed_file
from kmq_jax.nn import integers

FRONTENDS: dict[str, frontend.FrontEnd] = {
    "kiwano": frontend.KIWANO,
    "wespeaker": frontend.WESPEAKER,
    "3dspeaker": frontend.SPEAKER3D,
    "wespeaker60": dataclasses.replace(frontend.WESPEAKER, num_mel_bins=60),
    "wespeaker72": dataclasses.replace(frontend.WESPEAKER, num_mel_bins=72),
    "speechbrain": frontend.SPEECHBRAIN,
    "redimnet60": dataclasses.replace(frontend.REDIMNET, num_mel_bins=60),
    "redimnet72": frontend.REDIMNET,
    "redimnet60-15ms": dataclasses.replace(frontend.REDIMNET, num_mel_bins=60, frame_shift_ms=15.0),
    "redimnet72-15ms": dataclasses.replace(frontend.REDIMNET, frame_shift_ms=15.0),
    "resemblyzer": frontend.RESEMBLYZER,
}
FOREIGN = (".onnx", ".pt", ".pth", ".ckpt")
"""What files of other toolkits end in; `interop.import_model` makes a MODEL of them."""
BATCH_SIZE = 16
SPEECH_A_PROGRAM = 20 * 3600 * source.SAMPLE_RATE
"""Samples of a list for which it gets one shape on an accelerator. A shape takes seconds to compile; for fewer samples
one more would save less time than that in padding (how fast: .github/results/accelerator-h200.jsonl)."""
SPEECH_A_PROGRAM_OF_CPU = 60 * source.SAMPLE_RATE
"""The same on a CPU, up to eight shapes."""
PROGRAMS = 3, 16  # shapes on an accelerator, at least and at most
_MOST_PROGRAMS = 128  # compiled programs that are kept; each takes megabytes
_programs: set[Hashable] = set()
_programs_lock = threading.Lock()
Recording: TypeAlias = str | os.PathLike[str] | Array
_PREPARED = 8  # models that are held ready for ONNX Runtime
_UNPACKED = 3  # models whose weights JAX holds unpacked
PER_BITS = "narrow"  # the key in `variables` and in the file of what each smaller number of bits has to itself


def frontend_of(name: str) -> frontend.FrontEnd:
    """The filterbank setting of that name.

    Raises:
        UserError: there is none.

    >>> frontend_of("wespeaker").num_mel_bins
    80
    """
    if name not in FRONTENDS:
        raise UserError(f"frontend {name!r} must be one of {', '.join(FRONTENDS)}")
    return FRONTENDS[name]


def normalized_features(
    fbank: frontend.FrontEnd, wave: jax.Array, samples: jax.Array, most: int = 0
) -> tuple[jax.Array, jax.Array]:
    """What a network sees of recordings: features less their mean over all frames, then only the first `most` frames.

    Args:
        fbank: the filterbank.
        wave: `[batch, longest]`.
        samples: `[batch]`, real samples.
        most: frames kept; 0: all.

    Returns:
        `[batch, time, mel]`, and the real frames `[batch]` among `time`.
    """
    frames = frontend.num_frames(samples, fbank)
    features = frontend.features_of(wave, fbank, samples)
    return (features[:, :most], jnp.minimum(frames, most)) if most else (features, frames)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def embed_batch(
    network: SpeakerNetwork,
    fbank: frontend.FrontEnd,
    variables: Variables,
    wave: jax.Array,
    samples: jax.Array,
    most: int = 0,
) -> jax.Array:
    """Embeds recordings `wave` `[batch, longest]` of `samples` `[batch]` real samples each, to `[batch, dim]`.

    Of each, at most the first `most` frames count (0: all); the mean is that of all frames.
    """
    features, frames = normalized_features(fbank, wave, samples, most)
    embeddings: Array = network.apply(variables, features, frames, train=False)
    return embeddings


@dataclasses.dataclass(frozen=True, repr=False)
class SpeakerModel:
    """A network with its front end and weights. A pytree: `variables` are its leaves, the rest is static.

    Attributes:
        architecture: a name of `models.registry`.
        settings: the network's settings, as JSON values.
        frontend: name of the filterbank setting.
        variables: `{"params": tree, "batch_stats": tree}`; quantized tensors are `quant.CodebookTensor`s. Nested models
            may have `PER_BITS` beside them: for each smaller number of bits, such as "2", the biases and statistics
            that differ at these bits, by their names in the rest.
        bits: at how many bits nested tensors are read; None is the most.
        origin: where it was read from; what is derived from it is kept there. No part of the tree.
        about: what it tells of itself: source, licence, data. No part of the tree.

    >>> weights = quant.quantize_params({"kernel": np.ones((64, 64), "float32")}, bits=4)
    >>> SpeakerModel("resnet34", {}, "wespeaker", {"params": weights})
    SpeakerModel(resnet34, wespeaker features, 4 bits, 0.00 MB)
    """

    architecture: str
    settings: Row
    frontend: str
    variables: Variables
    bits: int | None = None
    origin: Path | None = dataclasses.field(default=None, compare=False)
    about: About = dataclasses.field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        have = sorted({bits for one in quant.codebook_tensors(self.variables) for bits in one.all_bits}) or [32]
        read = "" if self.bits is None else f", read at {self.bits}"
        size = quant.size_bytes(self.variables).total
        bits = f"{'/'.join(map(str, have))} bits{read}"
        return f"SpeakerModel({self.architecture}, {self.frontend} features, {bits}, {size / 1e6:.2f} MB)"

    def network(self, dtype: str = "float32") -> SpeakerNetwork:
        """The Linen module, computing in `dtype`, whatever the settings say of it."""
        return registry.build(self.architecture, **{**self.settings, "dtype": dtype})

    def embed(
        self,
        recording: Recording | Sequence[Recording],
        sample_rate: int | None = None,
        engine: Engine = "auto",
    ) -> np.ndarray:
        """Embeds one recording, or a list of them.

        Args:
            recording: a file's path; or an array `[samples]`, `[samples, channels]` or `[channels, samples]`, floating
                point with full scale 1 or signed integers; or a list of either.
            sample_rate: of arrays, in Hz; they are resampled to 16 kHz where it differs. Files have their own.
            engine: "jax", "onnxruntime", or "auto": ONNX Runtime on a CPU, JAX on accelerators.

        Returns:
            float32 `[dim]`, or `[recordings, dim]` for a list; not length-normalised.

        Raises:
            UserError: a recording cannot be read, is too short for the network or not finite; or the shape of an
                array does not tell channels from samples.
        """
        # A list of numbers is one recording, any other list several.
        if isinstance(recording, (list, tuple)) and not any(isinstance(x, (int, float)) for x in recording):
            if not recording:
                raise UserError("there is no recording to embed in an empty list")
            return embed_waves(self, [self._wave(one, sample_rate) for one in recording], engine=engine)
        return embed_waves(self, [self._wave(recording, sample_rate)], engine=engine)[0]

    def _wave(self, recording: Any, sample_rate: int | None) -> np.ndarray:
        if isinstance(recording, (str, os.PathLike)):
            return audio.read_audio(recording)
        if sample_rate is None:
            raise UserError("sample_rate (in Hz) must be given with an array of samples")
        if not audio.RATES[0] <= sample_rate <= audio.RATES[1]:
            raise UserError(f"sample_rate (={sample_rate}) must be {audio.RATES[0]} to {audio.RATES[1]} Hz")
        wave = audio.resample(mono(np.asarray(recording)), sample_rate)
        if len(wave) > audio.MAX_SECONDS * audio.SAMPLE_RATE:
            raise UserError(f"the recording is longer than {audio.MAX_SECONDS:.0f} s")
        audio.of_sound(wave)
        if not np.isfinite(wave).all() or frontend.num_frames(len(wave), frontend_of(self.frontend)) < 1:
            raise UserError("the recording is shorter than one analysis frame, or holds values that are not finite")
        return wave


def _static(model: SpeakerModel) -> Hashable:
    """All that decides what a model computes beside its weights."""
    settings = json.dumps(dict(model.settings), sort_keys=True)  # hashable, as static parts of a tree must be
    return model.architecture, settings, model.frontend, model.bits


def _flatten(model: SpeakerModel) -> tuple[tuple[tuple[GetAttrKey, Variables]], Hashable]:
    return ((GetAttrKey("variables"), model.variables),), _static(model)


def _unflatten(static: Any, children: Iterable[Variables]) -> SpeakerModel:
    architecture, settings, fbank, bits = static
    (variables,) = children
    return SpeakerModel(architecture, json.loads(settings), fbank, variables, bits)


jax.tree_util.register_pytree_with_keys(SpeakerModel, _flatten, _unflatten)


def mono(wave: np.ndarray) -> np.ndarray:
    """The mean of a recording's channels, float32 `[samples]`, full scale 1.

    Args:
        wave: `[samples]`, or with at most 32 channels on either side, `[samples, channels]` or `[channels, samples]`:
            the longer axis is that of samples. Floating point, or signed integers, whose full scale becomes 1.

    Raises:
        UserError: the shape or the type is another.

    >>> mono(np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])).tolist()
    [0.5, 0.5, 0.5]
    >>> mono(np.int16([16384, -32768])).tolist()
    [0.5, -1.0]
    """
    if wave.ndim not in (1, 2) or (
        wave.ndim == 2 and (min(wave.shape) > audio.MOST_CHANNELS or wave.shape[0] == wave.shape[1])
    ):
        raise UserError(f"wave (of shape {wave.shape}) must be [samples], [samples, channels] or [channels, samples]")
    if np.issubdtype(wave.dtype, np.signedinteger):
        # The full scale is that of the negative side, 32768 of 16 bits.
        wave = wave / -float(np.iinfo(wave.dtype).min)
    elif wave.dtype.kind not in "f" and wave.dtype.name != "bfloat16":
        raise UserError(f"wave (of {wave.dtype}) must be floating point with full scale 1, or signed integers")
    wave = np.asarray(wave, np.float32)
    return wave if wave.ndim == 1 else wave.mean(axis=int(np.argmin(wave.shape)))


def at_bits(model: SpeakerModel, bits: int | None) -> SpeakerModel:
    """The model read at `bits` (None: the most), with the biases and statistics that these bits have to themselves.

    Bits that all nested tensors can be read at leave the other tensors at their own. A model without nested tensors is
    read at the bits that all its quantized tensors have, and at no others: it is the same model, whatever is asked for.

    Raises:
        UserError: the model cannot be read at these bits, or is read at others already: it then lacks what these bits
            have to themselves.
    """
    if model.bits not in (None, bits) and _is_nested(model):
        raise UserError(f"the model is read at {model.bits} bits already: read the whole one at others")
    whole = {part: tree for part, tree in model.variables.items() if part != PER_BITS}
    tensors = quant.codebook_tensors(whole)
    have = [one.all_bits for one in tensors if one.coarse] or [one.all_bits for one in tensors]
    if bits is not None and not (have and all(bits in one for one in have)):
        raise UserError(f"the model cannot be read at {bits} bits{_its_bits(have)}")
    own = dict(named_leaves(model.variables.get(PER_BITS, {}).get(str(bits), {})))
    return dataclasses.replace(model, variables=replace_named(whole, own, quant.is_codebook_tensor), bits=bits)


def _its_bits(have: Sequence[tuple[int, ...]]) -> str:
    """At what bits a model can be read instead, from those of each tensor that leaves a choice.

    >>> _its_bits([(2, 4), (2, 3, 4)]), _its_bits([(2,), (4,)]), _its_bits([])
    (': only at 2, 4', ': its tensors have 2 to 4, each its own', ': it is not quantized')
    """
    if not have:
        return ": it is not quantized"
    shared = sorted(set.intersection(*map(set, have)))
    if shared:
        return f": only at {', '.join(map(str, shared))}"
    return f": its tensors have {min(map(min, have))} to {max(map(max, have))}, each its own"


def _is_nested(model: SpeakerModel) -> bool:
    return any(tensor.coarse for tensor in quant.codebook_tensors(model.variables))


def embed_waves(
    model: SpeakerModel, waves: list[np.ndarray], dtype: str = "float32", engine: Engine = "jax"
) -> np.ndarray:
    """Embeds recordings at 16 kHz held in memory, float32 `[len(waves), dim]`. See `embed_all`."""
    check_process()
    lengths = np.array([len(wave) for wave in waves])
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    check_lengths(network, fbank, lengths, lambda i: f"recording {i + 1} of {len(waves)}")
    runner = _runner(model, dtype, engine)
    if runner and len(waves) == 1 and not long.is_long(lengths[0]):
        return runner.embed(waves[0])[None]

    def plan(lengths: np.ndarray) -> list[buckets.Batch]:
        # Whole seconds: a service that embeds recordings one by one compiles once a second of length, not each length.
        return plan_batches(network, fbank, lengths, min(BATCH_SIZE, len(lengths)), step=source.SAMPLE_RATE)

    return _embed_rows(model, lengths, waves.__getitem__, dtype, runner, plan)[1]


def embed_all(
    model: SpeakerModel,
    utterances: source.Utterances,
    dtype: str = "float32",
    max_seconds: float = 0.0,
    batch_size: int = BATCH_SIZE,
    max_frames: int = 0,
    engine: Engine = "jax",
) -> np.ndarray:
    """Embeds every utterance of a table.

    By ONNX Runtime recordings go one by one, as they are. In JAX those of like length are padded to one of a few
    lengths and share a batch (`embedding_plan`). Embeddings do not depend on the batch (1e-5).

    Args:
        model: the network and weights.
        utterances: the table.
        dtype: "float32" or "bfloat16": the network's arithmetic.
        max_seconds: only so much from the start of each recording; 0 takes all.
        batch_size: recordings in a batch of JAX.
        max_frames: the network sees only so many frames, less the mean over all frames; 0: all. JAX alone does this.
        engine: "jax", "onnxruntime", or "auto": ONNX Runtime on a CPU, JAX on accelerators.

    Returns:
        float32 `[utterances, dim]`, in the table's order.

    Raises:
        UserError: a recording cannot be read or is too short; the message names it. Or `max_frames` are too few for
            the network.
    """
    return embed_share(model, utterances, (0, 1), dtype, max_seconds, batch_size, max_frames, engine)[1]


def embed_share(
    model: SpeakerModel,
    utterances: source.Utterances,
    share: tuple[int, int],
    dtype: str = "float32",
    max_seconds: float = 0.0,
    batch_size: int = BATCH_SIZE,
    max_frames: int = 0,
    engine: Engine = "jax",
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds the i-th of n shares of a table, of about equal work.

    A share has whole batches of those that the table is embedded in. So the shares together hold the bits that
    `embed_all` gives, on devices of as many.

    Args:
        model: the network and weights.
        utterances: the table.
        share: `(i, n)`.
        dtype: as the other arguments and errors, see `embed_all`.
        max_seconds: see there.
        batch_size: see there.
        max_frames: see there.
        engine: see there.

    Returns:
        Rows of the table, ascending, `[rows]`, and their embeddings, float32 `[rows, dim]`. A share may be empty.
    """
    check_process()
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    lengths = usable_lengths(network, fbank, utterances, max_seconds, max_frames)
    runner = None if max_frames else _runner(model, dtype, engine)

    def plan(lengths: np.ndarray) -> list[buckets.Batch]:
        return embedding_plan(network, fbank, lengths, batch_size)

    return _embed_rows(model, lengths, utterances.load, dtype, runner, plan, max_frames, progress, share)


def _embed_rows(
    model: SpeakerModel,
    lengths: np.ndarray,
    load: Callable[[int], np.ndarray],
    dtype: str,
    runner: OnnxModel | None,
    plan: Callable[[np.ndarray], list[buckets.Batch]],
    max_frames: int = 0,
    show: Callable[..., Any] = lambda rows, **words: rows,
    share: tuple[int, int] = (0, 1),
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds recordings: long ones one after the other in bounded memory, the others several at a time.

    Args:
        model: the network and weights.
        lengths: `[recordings]` samples; what a recording has beyond is cut.
        load: gives the samples of a recording by its number.
        dtype: of the network's arithmetic in JAX.
        runner: the model for ONNX Runtime; None: JAX.
        plan: which recordings of such lengths share a batch of JAX.
        max_frames: see `embed_all`.
        show: `progress`, or nothing.
        share: which part of the work is done, and returned.
    """
    network, mine = model.network(dtype), slice(share[0], None, share[1])
    embeddings = np.zeros((len(lengths), network.embedding_size), np.float32)
    # A long recording goes in chunks, or in parts where its network cannot be cut. With `max_frames` the latter embeds
    # the first frames in one run instead: they are all that it sees.
    apart = long.is_long(lengths) & (long.can_be_cut(network, frontend_of(model.frontend)) or not max_frames)
    order = np.argsort(-lengths, kind="stable")
    if apart.any():
        embed_one = _long_embedder(model, network, dtype, runner, max_frames)

        def read(row: int) -> np.ndarray:
            return load(row)[: lengths[row]]

        for row in show(order[apart[order]][mine].tolist(), desc="embedding", unit="long recording"):
            embeddings[row] = embed_one(functools.partial(read, row))
    done, rest = [order[apart[order]][mine]], order[~apart[order]]
    if runner and rest.size:
        rest = rest[mine]
        shown = show(range(len(rest)), desc="embedding", unit="recording")
        embeddings[rest] = runner.embed_all(lambda i: load(int(rest[i]))[: lengths[rest[i]]], shown, len(rest))
        done.append(rest)
    elif rest.size:
        rest = np.sort(rest)
        batches = plan(lengths[rest])[mine]  # of the whole list, so that a recording has the same others beside it
        shown = show(batches, desc="embedding", unit="batch")
        embeddings[rest] = _embed(model, shown, lengths[rest], lambda i: load(int(rest[i])), dtype, max_frames)
        done += [rest[batch.indices[batch.indices >= 0]] for batch in batches]
    rows = np.sort(np.concatenate(done))
    return rows, embeddings if share[1] == 1 else embeddings[rows]


def _long_embedder(
    model: SpeakerModel, network: SpeakerNetwork, dtype: str, runner: OnnxModel | None, max_frames: int
) -> Callable[[Callable[[], np.ndarray]], np.ndarray]:
    """Gives the function that embeds a recording too long for one run, from the function that reads it."""
    fbank = frontend_of(model.frontend)
    if isinstance(fbank, frontend.FbankConfig) and long.can_be_cut(network, fbank):
        long.places(network)  # refuses a network that has none, by either engine
        if runner:
            return runner.embed_long
        pieces = long.JaxPieces(network, _on_devices(model), fbank)
        return lambda read: long.embed(pieces, network, fbank, read, max_frames)
    engine: Engine = "onnxruntime" if runner else "jax"
    _tell_of_parts(model.architecture)
    return lambda read: long.mean_of_parts(lambda parts: embed_waves(model, parts, dtype, engine), read)


@functools.cache
def _tell_of_parts(architecture: str) -> None:
    """Says once what stands for a long recording, for it is not what one run would give."""
    print(
        f"{architecture} or its features look at an utterance as a whole: of recordings over {long.LONG:.0f} s, the "
        f"mean embedding of equal parts of at most {long.LONG:.0f} s is taken",
        file=sys.stderr,
    )


def embedding_plan(
    network: SpeakerNetwork, fbank: frontend.FrontEnd, lengths: np.ndarray, batch_size: int
) -> list[buckets.Batch]:
    """Decides which recordings are embedded together: as many shapes as are worth their compilations.

    On an accelerator a shape takes seconds to compile, in which some hours of speech could be embedded. On a CPU it is
    minutes of speech, so a short list gets one shape, and a longer one up to eight. That leaves padding, which takes
    less time than more compilations would: a third to four fifths of the speech in a list of 50 short recordings,
    about a tenth from a thousand on. Where a batch of the longest would hold more than 640 seconds, batches have at
    most 5 % of padding instead, if that can be.

    Args:
        network: what embeds them.
        fbank: its filterbank.
        lengths: `[recordings]` samples.
        batch_size: recordings in a batch at most.

    Returns:
        Batches that together hold every recording once.
    """
    rows = min(batch_size, len(lengths))
    if jax.default_backend() != "cpu":
        shapes = int(np.clip(lengths.sum() / SPEECH_A_PROGRAM, *PROGRAMS))
        return plan_batches(network, fbank, lengths, rows, max_shapes=shapes)
    short = rows * lengths.max() <= 4 * buckets.MOST_SAMPLES
    shapes = int(np.clip(lengths.sum() / SPEECH_A_PROGRAM_OF_CPU, 1, 8))
    return plan_batches(network, fbank, lengths, rows, **({"max_shapes": shapes} if short else {}))


_Made = TypeVar("_Made")


class _Newest(Generic[_Made]):
    """What was made of the models that were used last, so that it is made once, not at each call."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        # By identity: the tree is held beside what was made of it, so that no other can come to lie at its place.
        self._made: collections.OrderedDict[Hashable, tuple[Variables, _Made]] = collections.OrderedDict()

    def of(self, model: SpeakerModel, make: Callable[[], _Made]) -> _Made:
        """What `make` makes of a model, or made before."""
        key = id(model.variables), _static(model)  # the same weights in another network are another model
        with self._lock:  # threads that ask together wait for one to make it
            found = self._made.get(key)
            made = make() if found is None else found[1]
            self._made[key] = model.variables, made
            self._made.move_to_end(key)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
        return made


_prepared = _Newest["OnnxModel | None"](_PREPARED)
_unpacked = _Newest[Variables](_UNPACKED)


def _runner(model: SpeakerModel, dtype: str, engine: Engine) -> OnnxModel | None:
    """The model for ONNX Runtime, where that is the engine, else None; converted at the first call, then kept."""
    if chosen(engine, dtype) == "jax":
        return None

    def converted() -> OnnxModel | None:
        kept = kept_file(model.origin, fingerprint(model)) if model.origin else None
        try:
            return OnnxModel(model.network(), model.variables, frontend_of(model.frontend), model.bits, kept)
        except UserError:
            if engine != "auto":
                raise
            return None  # a network without an ONNX form

    made = _prepared.of(model, converted)
    # "auto" may have found before that it cannot be converted: who asks for ONNX Runtime by name is told why.
    return converted() if made is None and engine != "auto" else made


def _on_devices(model: SpeakerModel) -> Variables:
    """A model's weights, unpacked, on all devices of this process."""

    def unpacked() -> Variables:
        whole = quant.dequantize_params(model.variables, model.bits, np.float32)
        return jax.device_put(whole, mesh.replicated(mesh.make_mesh(jax.local_devices())))

    return _unpacked.of(model, unpacked) if quant.codebook_tensors(model.variables) else unpacked()


def _embed(
    model: SpeakerModel,
    plan: Iterable[buckets.Batch],
    lengths: np.ndarray,
    load: Callable[[int], np.ndarray],
    dtype: str,
    max_frames: int = 0,
) -> np.ndarray:
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    devices = mesh.make_mesh(jax.local_devices())
    variables = _on_devices(model)
    embeddings = np.zeros((len(lengths), network.embedding_size), np.float32)
    under_way: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

    def collect() -> None:
        members, values = under_way.popleft()
        embeddings[members] = np.asarray(values)[: len(members)]

    for batch in padded_batches(plan, lengths, load, devices):
        _forget_programs((network, fbank, dtype, batch.wave.shape))
        made = embed_batch(network, fbank, variables, batch.wave, batch.samples, max_frames)
        under_way.append((batch.members, made))
        if len(under_way) > 2:  # recordings are decoded while the devices work, but not without bound
            collect()
    while under_way:
        collect()
    return embeddings


def _forget_programs(shape: Hashable) -> None:
    """Drops compiled programs once they are many: a service meets new lengths for as long as it runs."""
    with _programs_lock:
        if shape not in _programs and len(_programs) >= _MOST_PROGRAMS:
            _programs.clear()
            embed_batch.clear_cache()  # type: ignore[attr-defined]
        _programs.add(shape)


def note(model: SpeakerModel) -> Note:
    """What must be known of a model to run its converted form without JAX; see `models.runner`."""
    return note_of(model.network(), frontend_of(model.frontend), fingerprint(model))


def fingerprint(model: SpeakerModel) -> str:
    """Twenty hexadecimal digits that tell one model from another: its network, front end and every weight's values,
    shape and axis. The bits at which it is read count where it is nested: any other is the same at all that it has.
    """
    bits = model.bits if _is_nested(model) else None
    text = json.dumps([model.architecture, dict(model.settings), model.frontend, bits], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    about: tuple[object, ...]
    parts: tuple[Array, ...]
    for name, leaf in named_leaves(model.variables, is_leaf=quant.is_codebook_tensor):
        # Shapes and axes, too: the same bytes in another order are another network.
        if quant.is_codebook_tensor(leaf):
            about, parts = (
                (leaf.shape, leaf.bits, leaf.axis, leaf.dtype_name),
                (leaf.packed, leaf.codebook, *leaf.coarse),
            )
        else:
            about, parts = (), (leaf,)
        digest.update(f"\n{name} {about}".encode())
        for part in parts:
            array = np.ascontiguousarray(part)
            digest.update(f" {array.shape} {array.dtype.name}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:20]


def save_model(path: str | Path, model: SpeakerModel) -> None:
    """Writes the model as one `.kmq` file.

    Raises:
        UserError: it cannot be written; or it is nested and read at some of its bits, so that it lacks what the others
            have to themselves.
    """
    if model.bits is not None and _is_nested(model):
        raise UserError(f"the model is read at {model.bits} bits: save the whole one, which is read at any of its bits")
    manifest = {
        "architecture": model.architecture,
        "settings": dict(model.settings),
        "frontend": model.frontend,
    }
    if model.about:
        manifest["about"] = dict(model.about)
    artifact.save(path, manifest, jax.device_get(model.variables))


def load_model(path: str | Path, bits: int | None = None) -> SpeakerModel:
    """Loads a MODEL: a training workdir (newest good checkpoint, or its average), a `.kmq` file, or an imported model.

    Args:
        path: the model; `hf://ORG/NAME` is fetched from the Hugging Face Hub (`core.hub.fetch`).
        bits: at how many bits a nested model is read; None is the most.

    Raises:
        UserError: there is no model at `path`, it is damaged, or it cannot be read at these bits.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.kmq")
    >>> save_model(file, SpeakerModel("resnet34", {}, "kiwano", {"params": {"bias": np.ones(4, "float32")}}))
    >>> load_model(file)
    SpeakerModel(resnet34, kiwano features, 32 bits, 0.00 MB)
    """
    path = fetch(str(path)) if is_place(str(path)) else Path(path)
    if path.suffix.lower() in FOREIGN and path.is_file():
        given, made = shlex.quote(str(path)), shlex.quote(path.stem)
        raise UserError(
            f"{path} is no MODEL yet: run kmq-jax import_model --source={given} --out={made}, then use {made}"
        )
    if file := packed_file(path):
        return _load_kmq(file, bits)
    if bits is not None:
        raise UserError(f"{path} is not quantized, so it cannot be read at {bits} bits")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no model: neither a .kmq file, nor a training workdir, nor an imported model")
    config = read_object(path / "config.json")
    settings = config.get("model")
    if not isinstance(settings, dict) or "name" not in settings:
        raise UserError(f"{path}/config.json does not name a network")
    settings = dict(settings)
    model = SpeakerModel(settings.pop("name"), settings, config.get("frontend", ""), None, origin=path)
    variables = _newest(path / "checkpoints")
    where = f"{path}/checkpoints"
    artifact.check_finite({name: np.asarray(leaf) for name, leaf in named_leaves(variables)}, where)
    model = dataclasses.replace(model, variables=variables)
    check_network(model, where)
    return model


def _newest(directory: Path) -> Variables:
    """The network of the newest checkpoint. A run that is at work may remove the one that is being read."""
    from kmq_jax.models.checkpoint import Checkpoints  # orbax is slow to import, and a packed model needs none

    checkpoints = Checkpoints(directory)
    for tries_left in reversed(range(3)):
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{directory} holds no finished checkpoint")
        try:
            return checkpoints.load(steps[-1], "network")
        except UserError:
            if not tries_left or checkpoints.steps()[-1:] == steps[-1:]:
                raise
    raise AssertionError("the last try raises")


def check_network(model: SpeakerModel, where: str) -> None:
    """Checks that a model's weights are those of its network: none missing or left over, each of the network's shape.

    A network that this process does not know cannot be checked, and passes.

    Args:
        model: from elsewhere.
        where: it comes from, for messages.

    Raises:
        UserError: they are not, the settings make no network, or the front end is unknown.
    """
    if not isinstance(model.architecture, str) or not isinstance(model.settings, dict):
        raise UserError(f"{where}: the network's name must be text and its settings an object")
    if not isinstance(model.frontend, str) or model.frontend not in FRONTENDS:
        raise UserError(f"{where}: frontend {model.frontend!r} must be one of {', '.join(FRONTENDS)}")
    if model.architecture not in registry.names():
        return
    given = {name: tuple(leaf.shape) for name, leaf in _plain_leaves(model)}
    try:
        expected = _shapes_of(model.architecture, json.dumps(model.settings, sort_keys=True))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever Flax makes of a setting of the wrong type
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{where}: the settings make no network: {type(error).__name__}: {reason}") from error
    for name, shape in expected.items():
        if name not in given:
            raise UserError(f"{where}: tensor {name} is missing")
        if given[name] != shape:
            raise UserError(f"{where}: tensor {name} has shape {given[name]}, but the network's is {shape}")
    if extra := sorted(given.keys() - expected.keys()):
        raise UserError(f"{where}: tensor {extra[0]} is none of the network's")
    _check_beside(model, given, where)


def _check_beside(model: SpeakerModel, given: dict[str, tuple[int, ...]], where: str) -> None:
    """The same for what a model has beside parameters and statistics: what bits have to themselves, and 8-bit steps.

    Args:
        model: from elsewhere.
        given: the shapes of its parameters and statistics.
        where: it comes from, for messages.
    """
    for part in (PER_BITS, integers.COLLECTION):
        beside = {part: model.variables.get(part, {})}
        for name, leaf in named_leaves(beside, is_leaf=quant.is_codebook_tensor):
            # "narrow/2/params/head/linear/bias" stands for "params/head/linear/bias".
            fits = _shapes_beside(name.split("/", 2)[-1] if part == PER_BITS else name, given)
            if not fits:
                raise UserError(f"{where}: tensor {name} is none of the network's")
            if tuple(leaf.shape) not in fits:
                raise UserError(f"{where}: tensor {name} has shape {leaf.shape}, but the network's is {fits[0]}")


def _shapes_beside(name: str, given: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes that a tensor beside parameters and statistics may have; none where it is none of the network's."""
    if name in given:
        return [given[name]]
    collection, _, place = name.partition("/")
    if collection != integers.COLLECTION:
        return []
    if not place.endswith("/kernel"):
        return [(2,)]
    # A step for each channel, or one for all.
    return [given[f"params/{place}"][-1:], (1,)] if f"params/{place}" in given else []


def _plain_leaves(model: SpeakerModel) -> list[tuple[str, Leaf]]:
    """The leaves of a model's parameters and statistics, without what bits have to themselves."""
    if not isinstance(model.variables, dict):
        return []
    whole = {part: tree for part, tree in model.variables.items() if part in ("params", "batch_stats")}
    return named_leaves(whole, is_leaf=quant.is_codebook_tensor)


@functools.lru_cache(maxsize=32)
def _shapes_of(architecture: str, settings: str) -> dict[str, tuple[int, ...]]:
    tree = registry.shapes(registry.build(architecture, **json.loads(settings)))
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)}


def _load_kmq(path: Path, bits: int | None) -> SpeakerModel:
    manifest, variables = artifact.load(path)
    try:
        about = manifest["architecture"], manifest["settings"], manifest["frontend"]
        told = checked(manifest.get("about", {}), str(path))
        whole = SpeakerModel(*about, variables, origin=path, about=told)
    except KeyError as error:
        raise UserError(f"{path}: the manifest lacks {error}") from error
    check_network(whole, str(path))
    if bits is None:
        return whole
    try:
        return at_bits(whole, bits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
