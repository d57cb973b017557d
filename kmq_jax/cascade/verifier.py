"""A cascade with its models: recordings in, decisions out. A model is loaded when a trial first needs it.

A cascade's directory holds `policy.json`, `cascade.json` (the file of the model for each level's bits) and the models.
"""

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kmq_jax import quant
from kmq_jax.cascade.policy import CascadePolicy, read_policy
from kmq_jax.cascade.run import map_scores
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_json, write_json
from kmq_jax.core.hub import is_place
from kmq_jax.core.tree import Array
from kmq_jax.data import audio, source
from kmq_jax.data.trials import Trials
from kmq_jax.models import registry
from kmq_jax.models.choices import Engine
from kmq_jax.models.speaker_model import (
    SpeakerModel,
    at_bits,
    embed_all,
    embed_waves,
    fingerprint,
    load_model,
    save_model,
)
from kmq_jax.scoring.cosine import average, cosine_scores

POLICY, INDEX = "policy.json", "cascade.json"
Recording = str | os.PathLike[str] | tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a cascade says of two recordings.

    Attributes:
        decision: whether it takes them for one speaker.
        score: on the full-precision model's scale; accepted where it is at least the policy's threshold.
        llr: natural log likelihood ratio of one speaker against two; None where the policy has none.
        bits: of the level that decided.
        seconds: spent on embedding, without loading models. The first recording of a length also compiles.
    """

    decision: bool
    score: float
    llr: float | None
    bits: int
    seconds: float

    def describe(self, threshold: float) -> str:
        """The verdict in one line.

        >>> Verification(True, 0.625, None, bits=2, seconds=0.1).describe(threshold=0.5)
        'same speaker: score 0.6250 is at least the threshold 0.5000; decided at 2 bits in 0.10 s'
        """
        sides = f"{'at least' if self.decision else 'below'} the threshold {threshold:.4f}"
        ratio = "" if self.llr is None else f", log likelihood ratio {self.llr:+.2f}"
        return (
            f"{'same speaker' if self.decision else 'different speakers'}: score {self.score:.4f} is {sides}{ratio}; "
            f"decided at {self.bits} bits in {self.seconds:.2f} s"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LazyRun:
    """What a cascade did with a trial list when every level embedded only the recordings that needed it.

    Attributes:
        scores: `[levels, trials]` float32, each level's own; zero where a lower level had decided the trial.
        embedded: how many recordings each level embedded, by its bits.
        seconds: time spent at each level, by its bits.
    """

    scores: np.ndarray
    embedded: dict[int, int]
    seconds: dict[int, float]


class Cascade:
    """A policy and the models of its bits."""

    def __init__(
        self, policy: CascadePolicy, files: Mapping[int, Path], compute: str = "float32", engine: Engine = "jax"
    ):
        """Makes a cascade; no model is loaded yet.

        Args:
            policy: maps, gates and threshold.
            files: the MODEL of each level, by its bits; levels of one nested model share it.
            compute: arithmetic of the levels below the last, "float32" or "bfloat16".
            engine: what runs the networks: "jax", "onnxruntime", or "auto", ONNX Runtime on a CPU.
        """
        self.policy, self.files, self.compute = policy, dict(files), compute
        self.engine: Engine = engine
        # By file: levels of one nested model share the whole one, and each reads it at its own bits.
        self._whole: Callable[[Path], SpeakerModel] = functools.cache(load_model)
        self._models: dict[int, SpeakerModel] = {}
        self._loading = threading.Lock()

    def model_at(self, level: int) -> SpeakerModel:
        """The model of a level, loaded when it is first asked for.

        Raises:
            UserError: it cannot be read, or is not the one that the policy was made for.
        """
        with self._loading:  # threads that ask at the same time share one copy
            if level not in self._models:
                bits = self.policy.bits[level]
                whole = self._whole(self.files[bits])
                self._models[level] = _read_at(whole, bits, self.policy.models[level], str(self.files[bits]))
            return self._models[level]

    def compute_of(self, level: int) -> str:
        """The arithmetic of a level; the last one always has float32."""
        return self.compute if level < len(self.policy.bits) - 1 else "float32"

    def verify(self, enrol: Recording | list[Recording], test: Recording) -> Verification:
        """Decides whether two recordings are of one speaker.

        Args:
            enrol: a file, or `(wave, sample rate)` with a wave as in `data.audio.to_mono_16k`; or a list of either, of
                which the mean of the length-normalised embeddings is compared. Maps and threshold are those of the
                policy in any case.
            test: a file, or `(wave, sample rate)`.

        Raises:
            UserError: a recording cannot be read, is too short or silent; or the list is empty.
        """
        several = enrol if isinstance(enrol, list) else [enrol]
        pair, policy = _Pair(self, several, test), self.policy
        top = len(policy.bits) - 1
        for level in range(top + 1):
            score = pair.score(level)
            if level == top or not _climbs(policy, level, score):
                break
        fitted = policy.llr_maps[level] if policy.llr_maps else None
        llr = fitted.scale * score + fitted.offset if fitted else None
        accepted = bool(score >= np.float32(policy.threshold))
        return Verification(accepted, score, llr, policy.bits[level], pair.seconds)

    def score(self, utterances: source.Utterances, trials: Trials) -> LazyRun:
        """Scores a trial list; each level embeds only the recordings of trials that are still in doubt.

        Args:
            utterances: the recordings.
            trials: rows of `utterances`.

        Raises:
            UserError: a recording cannot be read.
        """
        policy, top = self.policy, len(self.policy.bits) - 1
        scores = np.zeros((top + 1, len(trials)), np.float32)
        # Ones until a recording is embedded: zeros could not be scored. `done` says which rows are embeddings.
        tables = {level: np.ones((len(utterances), 1), np.float32) for level in range(top + 1)}
        done = {level: np.zeros(len(utterances), bool) for level in range(top + 1)}
        seconds = dict.fromkeys(policy.bits, 0.0)

        def embed(level: int, rows: np.ndarray) -> np.ndarray:
            # Utterances of undecided trials that this level has not embedded yet.
            missing = np.flatnonzero(np.bincount(rows, minlength=len(utterances)).astype(bool) & ~done[level])
            if missing.size:
                made = embed_all(
                    self.model_at(level), utterances.select(missing), self.compute_of(level), engine=self.engine
                )
                # The dimension of a level's embeddings is known once the first are made.
                if tables[level].shape[1] != made.shape[1]:
                    tables[level] = np.ones((len(utterances), made.shape[1]), np.float32)
                tables[level][missing], done[level][missing] = made, True
            return tables[level]

        doubt = np.arange(len(trials))
        for level, bits in enumerate(policy.bits):
            start = time.perf_counter()
            enrol, test = trials.enrol[doubt], trials.test[doubt]
            if policy.enrolment == "top":
                enrolled, tested = embed(top, enrol), embed(level, test)
            else:
                enrolled = tested = embed(level, np.concatenate([enrol, test]))
            if doubt.size:
                scores[level, doubt] = cosine_scores(enrolled, tested, enrol, test)
            if level < top:
                # All levels are mapped, for the one compiled program; only this one's scores are looked at.
                doubt = doubt[_climbs(policy, level, map_scores(policy, scores)[level, doubt])]
            seconds[bits] = time.perf_counter() - start
        return LazyRun(scores, {bits: int(done[i].sum()) for i, bits in enumerate(policy.bits)}, seconds)

    def costs(self, frames: int = 300) -> Json:
        """What the cascade holds and computes.

        Args:
            frames: length of the recording that `macs` counts for.

        Returns:
            `resident_bytes`: of all models as packed, each file counted once; `macs`: multiply-accumulates of each
            level's network, by its bits.
        """
        held = {file: quant.size_bytes(self._whole(file).variables).total for file in self.files.values()}
        macs = [registry.macs(self.model_at(level).network(), frames) for level in range(len(self.policy.bits))]
        return {
            "resident_bytes": sum(held.values()),
            "macs": {str(bits): count for bits, count in zip(self.policy.bits, macs)},
        }


class _Pair:
    """Recordings of a claimed speaker and one to verify. Each is embedded at a level when that is first needed.

    Attributes:
        seconds: spent on embedding so far.
    """

    def __init__(self, cascade: Cascade, enrol: list[Recording], test: Recording):
        """Reads the recordings."""
        if not enrol:
            raise UserError("there is no recording of the claimed speaker")
        self.cascade, self.seconds = cascade, 0.0
        self._waves = [audio.read_recording(recording) for recording in (*enrol, test)]  # the one to verify is the last
        self._embeddings: dict[tuple[int, int], np.ndarray] = {}  # by level and place among the waves

    def score(self, level: int) -> float:
        """The score at a level, on the reference's scale."""
        policy = self.cascade.policy
        top = len(policy.bits) - 1
        enrolled = top if policy.enrolment == "top" else level
        *enrol, test = range(len(self._waves))  # places among the waves
        if policy.enrolment == "top":
            self._embed(enrolled, enrol)
            self._embed(level, (test,))
        else:
            self._embed(level, (*enrol, test))  # in one call, which may batch them
        several = np.stack([self._embeddings[enrolled, one] for one in enrol])
        speaker = several[0] if len(enrol) == 1 else average(several, [enrol])[0]
        rows = np.stack([speaker, self._embeddings[level, test]])
        own = np.zeros((top + 1, 1), np.float32)  # `map_scores` takes all levels; the others' zeros have no effect
        own[level] = cosine_scores(rows, rows, np.array([0]), np.array([1]))
        return float(map_scores(policy, own)[level, 0])

    def _embed(self, level: int, which: Sequence[int]) -> None:
        """Embeds waves, by their places, that have no embedding at a level yet."""
        network = self.cascade.model_at(level)
        needed = [one for one in which if (level, one) not in self._embeddings]
        start = time.perf_counter()  # the model is loaded by now
        if needed:
            waves, compute = [self._waves[one] for one in needed], self.cascade.compute_of(level)
            made = embed_waves(network, waves, compute, self.cascade.engine)
            self._embeddings.update({(level, one): row for one, row in zip(needed, made)})
        self.seconds += time.perf_counter() - start


def load_cascade(
    directory: str | os.PathLike[str], compute: str = "float32", engine: Engine = "auto", vad: bool = False
) -> Cascade:
    """Opens a cascade's directory, as `save_cascade` (and `calibrate --cascade`) wrote it. No model is loaded yet.

    Args:
        directory: of the cascade.
        compute: arithmetic of the levels below the last, "float32" or "bfloat16".
        engine: what runs the networks: "jax", "onnxruntime", or "auto", ONNX Runtime on a CPU and JAX elsewhere.
        vad: whether it will be given speech alone; a line warns where it was fitted otherwise.

    Raises:
        UserError: it is no cascade, or one of its files is missing or damaged.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} is no cascade: it lacks {INDEX} (see calibrate --cascade)")
    policy, index = read_policy(directory / POLICY), read_json(directory / INDEX)
    policy.warn_of_vad(vad)
    files = index.get("models") if isinstance(index, dict) else None
    if not isinstance(files, dict) or set(files) != {str(bits) for bits in policy.bits}:
        raise UserError(f"{directory / INDEX} does not name a model for each of {policy.bits} bits")
    for name in files.values():
        # The index may come from anyone: a path in it could name any file of this machine.
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise UserError(f"{directory / INDEX} names {name!r}, which is no file beside it")
    return Cascade(policy, {int(bits): directory / name for bits, name in files.items()}, compute, engine)


def save_cascade(directory: str | os.PathLike[str], policy: CascadePolicy, models: Mapping[int, str]) -> None:
    """Writes a cascade's directory: the policy, and one copy of each model, which levels of one nested model share.

    Args:
        directory: made where it is missing.
        policy: maps, gates and threshold.
        models: the MODEL of each level, by its bits.

    Raises:
        UserError: a level has no model, or one that the policy was not made for; or `enrolment` is "top" while the
            levels are different networks.
    """
    directory = Path(directory)
    if set(models) != set(policy.bits):
        raise UserError(f"a cascade of {policy.bits} bits needs a model for each, got {tuple(sorted(models))}")
    held: dict[str, tuple[str, SpeakerModel]] = {}  # by file: the copy's name and the model
    names: dict[str, str] = {}
    networks = set()
    # All are checked before any is written: a cascade that lies there is left whole where this one is refused.
    for level, bits in enumerate(policy.bits):
        place = models[bits] if is_place(models[bits]) else str(Path(models[bits]).resolve())
        if place not in held:  # levels of one nested model share its file
            held[place] = f"{bits}.kmq", load_model(place)
        names[str(bits)], whole = held[place]
        networks.add(whole.architecture)
        if policy.enrolment == "top" and len(networks) > 1:
            raise UserError(
                f"`enrolment` (=top) compares embeddings of one network, not of {', '.join(sorted(networks))}"
            )
        _read_at(whole, bits, policy.models[level], models[bits])
    directory.mkdir(parents=True, exist_ok=True)
    for name, whole in held.values():
        save_model(directory / name, whole)
    policy.save(directory / POLICY)
    write_json(directory / INDEX, {"kind": "cascade", "models": names})


def _read_at(whole: SpeakerModel, bits: int, known: str | None, place: str) -> SpeakerModel:
    """The model read at a level's bits; refuses one whose fingerprint is not the `known` one, where that is known."""
    nested = [tensor for tensor in quant.codebook_tensors(whole.variables) if tensor.coarse]
    found = at_bits(whole, bits) if nested else whole
    # Embeddings that were extracted without --bits carry the fingerprint of the whole nested model. They are of its
    # most bits, so this fingerprint is accepted at that level alone.
    same = [found, *([whole] if nested and bits == max(tensor.bits for tensor in nested) else ())]
    if known and known not in map(fingerprint, same):
        hint = f" (extract --bits={bits})" if nested else ""
        raise UserError(f"{place} is not the model that the policy was made for at {bits} bits{hint}")
    return found


def _climbs(policy: CascadePolicy, level: int, score: Array) -> Array:
    # The gate in float32, as the compiled cascade compares.
    low, high = np.asarray(policy.gates[level], np.float32)
    return (low < score) & (score < high)
