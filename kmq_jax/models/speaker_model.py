"""A speaker model: network, front end and weights; recordings in, embeddings out."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from kmq_jax import frontend, quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Array, Variables, named_leaves, replace_named
from kmq_jax.data import audio, buckets, source
from kmq_jax.models import artifact, registry
from kmq_jax.models.batches import check_lengths, padded_batches, plan_batches, usable_lengths
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.protocol import SpeakerNetwork

FRONTENDS = {
    "kiwano": frontend.KIWANO,
    "wespeaker": frontend.WESPEAKER,
    "3dspeaker": frontend.SPEAKER3D,
    "wespeaker60": dataclasses.replace(frontend.WESPEAKER, num_mel_bins=60),
    "wespeaker72": dataclasses.replace(frontend.WESPEAKER, num_mel_bins=72),
}
COMPUTE = ("float32", "bfloat16")
BATCH_SIZE = 16
Recording: TypeAlias = str | os.PathLike[str] | Array
PER_BITS = "narrow"  # the key in `variables` and in the file of what each smaller number of bits has to itself


def frontend_of(name: str) -> frontend.FbankConfig:
    """The filterbank setting of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FRONTENDS:
        raise UserError(f"frontend {name!r} must be one of {', '.join(FRONTENDS)}")
    return FRONTENDS[name]


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_batch(
    network: SpeakerNetwork, fbank: frontend.FbankConfig, variables: Variables, wave: jax.Array, samples: jax.Array
) -> jax.Array:
    """Embeds recordings `wave` `[batch, longest]` of `samples` `[batch]` real samples each, to `[batch, dim]`."""
    frames = frontend.num_frames(samples, fbank)
    features = frontend.mean_normalize(frontend.fbank(wave, fbank), frames)
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
    """

    architecture: str
    settings: Mapping[str, Any]
    frontend: str
    variables: Variables
    bits: int | None = None

    def __repr__(self) -> str:
        leaves = [x for x in jax.tree.leaves(self.variables, quant.is_codebook_tensor) if quant.is_codebook_tensor(x)]
        have = sorted({bits for leaf in leaves for bits in leaf.all_bits}) or [32]
        read = "" if self.bits is None else f", read at {self.bits}"
        size = quant.size_bytes(self.variables).total
        bits = f"{'/'.join(map(str, have))} bits{read}"
        return f"SpeakerModel({self.architecture}, {self.frontend} features, {bits}, {size / 1e6:.2f} MB)"

    def network(self, dtype: str = "float32") -> SpeakerNetwork:
        """The Linen module, computing in `dtype`."""
        return registry.build(self.architecture, **self.settings, dtype=dtype)

    def embed(self, recording: Recording | Sequence[Recording], sample_rate: int | None = None) -> np.ndarray:
        """Embeds one recording, or a list of them.

        Args:
            recording: a file's path; or an array `[samples]`, `[samples, channels]` or `[channels, samples]`, floating
                point with full scale 1 or signed integers; or a list of either.
            sample_rate: of arrays, in Hz; they are resampled to 16 kHz where it differs. Files have their own.

        Returns:
            float32 `[dim]`, or `[recordings, dim]` for a list; not length-normalised.

        Raises:
            UserError: a recording cannot be read, is too short for the network or not finite; or the shape of an
                array does not tell channels from samples.
        """
        if isinstance(recording, (list, tuple)) and not any(isinstance(x, (int, float)) for x in recording):
            if not recording:
                raise UserError("there is no recording to embed in an empty list")
            return embed_waves(self, [self._wave(one, sample_rate) for one in recording])
        return embed_waves(self, [self._wave(recording, sample_rate)])[0]

    def _wave(self, recording: Any, sample_rate: int | None) -> np.ndarray:
        if isinstance(recording, (str, os.PathLike)):
            return audio.read_audio(recording)
        if sample_rate is None:
            raise UserError("sample_rate (in Hz) must be given with an array of samples")
        wave = audio.resample(mono(np.asarray(recording)), sample_rate)
        if not np.isfinite(wave).all() or frontend.num_frames(len(wave), frontend_of(self.frontend)) < 1:
            raise UserError("the recording is shorter than one analysis frame, or holds values that are not finite")
        return wave


def _flatten(model: SpeakerModel) -> tuple[tuple[tuple[GetAttrKey, Variables]], Hashable]:
    settings = json.dumps(dict(model.settings), sort_keys=True)  # hashable, as static parts of a tree must be
    return ((GetAttrKey("variables"), model.variables),), (model.architecture, settings, model.frontend, model.bits)


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
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and (min(wave.shape) > 32 or wave.shape[0] == wave.shape[1])):
        raise UserError(f"wave (of shape {wave.shape}) must be [samples], [samples, channels] or [channels, samples]")
    if np.issubdtype(wave.dtype, np.signedinteger):
        wave = wave / -float(np.iinfo(wave.dtype).min)
    elif wave.dtype.kind not in "f" and wave.dtype.name != "bfloat16":
        raise UserError(f"wave (of {wave.dtype}) must be floating point with full scale 1, or signed integers")
    wave = np.asarray(wave, np.float32)
    return wave if wave.ndim == 1 else wave.mean(axis=int(np.argmin(wave.shape)))


def at_bits(model: SpeakerModel, bits: int | None) -> SpeakerModel:
    """The model read at `bits` (None: the most), with the biases and statistics that these bits have to themselves.

    Raises:
        UserError: no tensor can be read at these bits.
    """
    whole = {part: tree for part, tree in model.variables.items() if part != PER_BITS}
    leaves = [leaf for leaf in jax.tree.leaves(whole, quant.is_codebook_tensor) if quant.is_codebook_tensor(leaf)]
    if bits is not None and not any(bits in leaf.all_bits for leaf in leaves):
        raise UserError(f"the model cannot be read at {bits} bits")
    own = dict(named_leaves(model.variables.get(PER_BITS, {}).get(str(bits), {})))
    return dataclasses.replace(model, variables=replace_named(whole, own, quant.is_codebook_tensor), bits=bits)


def embed_waves(model: SpeakerModel, waves: list[np.ndarray], dtype: str = "float32") -> np.ndarray:
    """Embeds recordings at 16 kHz held in memory, float32 `[len(waves), dim]`. See `embed_all`."""
    lengths = np.array([len(wave) for wave in waves])
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    check_lengths(network, fbank, lengths, lambda i: f"recording {i + 1} of {len(waves)}")
    # Whole seconds: a service that embeds recordings one by one compiles once a second of length, not once a length.
    plan = plan_batches(network, fbank, lengths, min(BATCH_SIZE, len(waves)), step=source.SAMPLE_RATE)
    return _embed(model, plan, lengths, waves.__getitem__, dtype)


def embed_all(
    model: SpeakerModel,
    utterances: source.Utterances,
    dtype: str = "float32",
    max_seconds: float = 0.0,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """Embeds every utterance of a table.

    Recordings of like length are padded to one of a few lengths and share a batch; every batch of a length has the
    same shape, so there are as many compilations as lengths. Embeddings do not depend on the batch (1e-5).

    Args:
        model: the network and weights.
        utterances: the table.
        dtype: "float32" or "bfloat16": the network's arithmetic.
        max_seconds: only so much from the start of each recording; 0 takes all.
        batch_size: recordings in a batch.

    Returns:
        float32 `[utterances, dim]`, in the table's order.

    Raises:
        UserError: a recording cannot be read or is too short; the message names it.
    """
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    lengths = usable_lengths(network, fbank, utterances, max_seconds)
    plan = progress(
        plan_batches(network, fbank, lengths, min(batch_size, len(lengths))), desc="embedding", unit="batch"
    )
    return _embed(model, plan, lengths, utterances.load, dtype)


def _embed(
    model: SpeakerModel,
    plan: Iterable[buckets.Batch],
    lengths: np.ndarray,
    load: Callable[[int], np.ndarray],
    dtype: str,
) -> np.ndarray:
    network, fbank = model.network(dtype), frontend_of(model.frontend)
    devices = mesh.make_mesh(jax.local_devices())
    variables = jax.device_put(
        quant.dequantize_params(model.variables, model.bits, np.float32), mesh.replicated(devices)
    )
    embeddings = np.zeros((len(lengths), network.embedding_size), np.float32)
    under_way: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

    def collect() -> None:
        members, values = under_way.popleft()
        embeddings[members] = np.asarray(values)[: len(members)]

    for batch in padded_batches(plan, lengths, load, devices):
        under_way.append((batch.members, embed_batch(network, fbank, variables, batch.wave, batch.samples)))
        if len(under_way) > 2:  # recordings are decoded while the devices work, but not without bound
            collect()
    while under_way:
        collect()
    return embeddings


def fingerprint(model: SpeakerModel) -> str:
    """Twenty hexadecimal digits that tell one model from another: its network, front end and every weight."""
    text = json.dumps([model.architecture, dict(model.settings), model.frontend, model.bits], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, leaf in named_leaves(model.variables):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:20]


def save_model(path: str | Path, model: SpeakerModel) -> None:
    """Writes the model as one `.kmq` file.

    Raises:
        UserError: it cannot be written.
    """
    manifest = {
        "architecture": model.architecture,
        "settings": dict(model.settings),
        "frontend": model.frontend,
    }
    artifact.save(path, manifest, jax.device_get(model.variables))


def load_model(path: str | Path, bits: int | None = None) -> SpeakerModel:
    """Loads a MODEL: a training workdir (newest good checkpoint, or its average), a `.kmq` file, or an imported model.

    Args:
        path: the model.
        bits: at how many bits a nested model is read; None is the most.

    Raises:
        UserError: there is no model at `path`, it is damaged, or it cannot be read at these bits.
    """
    path = Path(path)
    for file in (path, path / "averaged.kmq", path / "model.kmq"):
        if file.is_file():
            return _load_kmq(file, bits)
    if bits is not None:
        raise UserError(f"{path} is not quantized, so it cannot be read at {bits} bits")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no model: neither a .kmq file, nor a training workdir, nor an imported model")
    config = read_json(path / "config.json")
    settings = dict(config["model"])
    model = SpeakerModel(settings.pop("name"), settings, config["frontend"], None)
    with Checkpoints(path / "checkpoints") as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"{path}/checkpoints holds no finished checkpoint")
        return dataclasses.replace(model, variables=checkpoints.load(checkpoints.steps()[-1], "network"))


def _load_kmq(path: Path, bits: int | None) -> SpeakerModel:
    manifest, variables = artifact.load(path)
    try:
        whole = SpeakerModel(manifest["architecture"], manifest["settings"], manifest["frontend"], variables)
    except KeyError as error:
        raise UserError(f"{path}: the manifest lacks {error}") from error
    if bits is None:
        return whole
    try:
        return at_bits(whole, bits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
