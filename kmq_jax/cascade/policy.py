"""The cascade's policy: which bits score a trial, in which order, and when a trial may stop."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.cascade.options import ENROLMENTS, MAPS
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_json, write_json
from kmq_jax.core.progress import say_once
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap, fit_isotonic, fit_logistic, map_from_dict

VERSION = 1
_MOST_BITS = 64
_LARGEST = 1e30  # of maps and threshold: products and sums of such numbers with scores fit float32
Gate = tuple[float, float]


@dataclass(frozen=True, eq=False)
class CascadePolicy:
    """A cascade of levels. Each level has its bits and a map to the reference's scores; all but the last have a gate.

    A trial is scored at the first level. If the mapped score lies inside the gate, `low < score < high`, the trial is
    in doubt and climbs to the next level. If not, it stops, and is accepted if `score >= threshold`. So the gate
    `(threshold, threshold)` stops every trial, and `(-inf, inf)` stops none. The paper's gates are symmetric:
    `(threshold - t, threshold + t)`. Here the two sides may differ.

    Attributes:
        bits: bits of each level, ascending.
        maps: each level's map from its scores to the reference's.
        gates: `(low, high)` of each level but the last, with the threshold between them or equal to either.
        threshold: on the reference's scale.
        llr_maps: each level's map from reference scale to natural log likelihood ratio; None where it was not fitted.
        enrolment: "each": both sides at the level's bits; "top": the enrolled side always at the last level's.
        models: fingerprint of each level's model, None where unknown.
        dims: each level's embedding size, None where unknown.
        notes: how the policy was made: for people. Decisions do not depend on them.
        seconds: what a recording takes at each level, where gates were chosen by it: the bits of different networks say
            little about their work. None elsewhere.
        vad: whether it was fitted on speech alone (`extract --vad`); None where that is not known.

    >>> line = AffineMap(1.0, 0.0)
    >>> policy = CascadePolicy((2, 4), (line, line), symmetric_gates(0.5, [0.25]), threshold=0.5)
    >>> policy.gates
    ((0.25, 0.75),)
    """

    bits: tuple[int, ...]
    maps: tuple[AffineMap | IsotonicMap, ...]
    gates: tuple[Gate, ...]
    threshold: float
    llr_maps: tuple[AffineMap, ...] | None = None
    enrolment: str = "each"
    models: tuple[str | None, ...] = ()
    dims: tuple[int | None, ...] = ()
    notes: Json = field(default_factory=dict)
    seconds: tuple[float, ...] | None = None
    vad: bool | None = None

    def __post_init__(self) -> None:
        levels = len(self.bits)
        for name in ("models", "dims"):
            if not getattr(self, name):
                # The way to fill in a field of a frozen dataclass.
                object.__setattr__(self, name, (None,) * levels)
        sizes = [len(self.maps), len(self.gates) + 1, len(self.models), len(self.dims)]
        sizes += [] if self.llr_maps is None else [len(self.llr_maps)]
        if levels < 1 or set(sizes) != {levels}:
            raise UserError(f"a policy of {levels} bits needs as many maps and one gate less")
        if any(a >= b for a, b in zip(self.bits, self.bits[1:])) or self.bits[0] < 1:
            raise UserError(f"the bits of a cascade must ascend, got {self.bits}")
        if self.bits[-1] > _MOST_BITS:
            raise UserError(f"the bits of a cascade must be at most {_MOST_BITS}, got {self.bits}")
        if not math.isfinite(self.threshold):
            raise UserError(f"the threshold (={self.threshold}) must be finite")
        self._check_numbers()
        for bits, (low, high) in zip(self.bits, self.gates):
            if not low <= self.threshold <= high:  # NaN fails as well
                raise UserError(f"the gate ({low}, {high}) of {bits} bits must hold the threshold {self.threshold}")
        if self.seconds is not None and (len(self.seconds) != levels or not _positive(self.seconds)):
            raise UserError(f"`seconds` (={self.seconds}) must be a number above zero for each of {levels} levels")
        if self.enrolment not in ENROLMENTS:
            raise UserError(f"enrolment {self.enrolment!r} must be one of {', '.join(ENROLMENTS)}")

    def _check_numbers(self) -> None:
        """Refuses numbers that are infinite in float32, which the compiled cascade computes in."""
        numbers = [np.array([self.threshold])]
        for fitted in (*self.maps, *(self.llr_maps or ())):
            if isinstance(fitted, AffineMap):
                numbers.append(np.array([fitted.scale, fitted.offset]))
            else:
                numbers += [fitted.x, fitted.y]
        size = np.abs(np.concatenate(numbers))
        if not (size <= _LARGEST).all():  # NaN fails as well
            raise UserError(f"the maps and the threshold of a cascade must be at most {_LARGEST:g}, got {size.max():g}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON, for `read_policy`. An infinite side of a gate is null: JSON has no infinity."""
        levels = []
        for i, bits in enumerate(self.bits):
            level: Json = {"bits": bits, "map": self.maps[i].to_dict()}
            if i < len(self.gates):
                level["gate"] = [side if math.isfinite(side) else None for side in self.gates[i]]
            level |= {"llr": self.llr_maps[i].to_dict() if self.llr_maps else None}
            level |= {"seconds": self.seconds[i]} if self.seconds else {}
            levels.append(level | {"model": self.models[i], "dim": self.dims[i]})
        write_json(
            path,
            {
                "kind": "cascade policy",
                "version": VERSION,
                "threshold": self.threshold,
                "enrolment": self.enrolment,
                "vad": self.vad,
                "levels": levels,
                "notes": self.notes,
            },
        )

    def warn_of_vad(self, vad: bool | None) -> None:
        """Warns where it was fitted with voice activity detection and `vad` is off now, or the reverse."""
        if None not in (self.vad, vad) and self.vad != vad:
            then, now = ("without", "with") if vad else ("with", "without")
            say_once(f"warning: the cascade was fitted {then} vad, now it is {now}: its gates were chosen for others")

    def check(self, bits: int, level: int, dim: int, model: str | None, source: str) -> None:
        """Refuses embeddings that the policy was not made for.

        Args:
            bits: that the embeddings are said to be of.
            level: their place in the cascade, from 0.
            dim: their dimensions.
            model: fingerprint of their model, where known.
            source: their file, for messages.

        Raises:
            UserError: the bits, the dimensions or the model differ from the policy's.
        """
        if bits != self.bits[level]:
            raise UserError(f"the policy's level {level + 1} has {self.bits[level]} bits, but {source} {bits}")
        if self.dims[level] not in (None, dim):
            raise UserError(
                f"--stage={bits}:{source} has {dim} dimensions, but the policy was made for {self.dims[level]}"
            )
        known = self.models[level]
        if known and model and known != model:
            raise UserError(f"--stage={bits}:{source} is of the model {model}, but the policy was made for {known}")


def read_policy(path: str | os.PathLike[str]) -> CascadePolicy:
    """Reads a policy that `CascadePolicy.save` wrote.

    Raises:
        UserError: the file is missing, is no policy, is of another version, or has impossible values; the message names
            the file.
    """
    value = read_json(path)
    try:
        if not isinstance(value, dict) or value.get("kind") != "cascade policy":
            raise UserError("it is no cascade policy")
        if value["version"] != VERSION:
            raise UserError(f"its version is {value['version']}, this program reads version {VERSION}")
        levels = value["stages" if "stages" in value else "levels"]  # older files say "stages"
        llrs = tuple(_affine(level["llr"]) for level in levels if level["llr"] is not None)
        return CascadePolicy(
            tuple(_integer(level["bits"]) for level in levels),
            tuple(map_from_dict(level["map"]) for level in levels),
            tuple(_gate(level["gate"]) for level in levels[:-1]),
            float(value["threshold"]),
            llrs or None,
            value["enrolment"],
            tuple(None if level["model"] is None else str(level["model"]) for level in levels),
            tuple(None if level["dim"] is None else _integer(level["dim"]) for level in levels),
            dict(value.get("notes") or {}),
            tuple(float(level["seconds"]) for level in levels) if any("seconds" in level for level in levels) else None,
            _truth(value.get("vad")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{Path(path)}: {what}") from error


def _positive(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):  # a bool is an int in Python
        raise UserError(f"{value!r} is not a whole number")
    return value


def _truth(value: object) -> bool | None:
    if not isinstance(value, bool | None):
        raise UserError(f"{value!r} is not a truth value")
    return value


def _gate(value: tuple[float | None, float | None]) -> Gate:
    low, high = value
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _affine(value: object) -> AffineMap:
    found = map_from_dict(value)
    if not isinstance(found, AffineMap):
        raise UserError("a map to log likelihood ratios must be affine")
    return found


def symmetric_gates(threshold: float, distances: ArrayLike) -> tuple[Gate, ...]:
    """The paper's gates: a trial climbs where its score is nearer the threshold than the level's distance.

    Args:
        threshold: on the reference's scale.
        distances: `[levels - 1]`, one for each level but the last.

    >>> symmetric_gates(0.5, [0.25, 0.125])
    ((0.25, 0.75), (0.375, 0.625))
    """
    return tuple((threshold - t, threshold + t) for t in np.asarray(distances, np.float64).tolist())


def fit_map(kind: str, scores: ArrayLike, reference: ArrayLike, labels: ArrayLike) -> AffineMap | IsotonicMap:
    """Fits a nondecreasing map from a level's scores to the reference's scores of the same trials.

    Args:
        kind: "isotonic": least squares among all nondecreasing maps; "affine": among straight lines; "logistic":
            the straight line that makes both scores the same log likelihood ratio, by logistic fits to the labels.
        scores: `[trials]`.
        reference: `[trials]`.
        labels: `[trials]`, true for target trials; only "logistic" looks at them.

    Raises:
        UserError: the kind is unknown, there is no trial, or "logistic" lacks target or nontarget trials or a reference
            that tells them apart.

    >>> fitted = fit_map("affine", [0.0, 1.0, 2.0], [1.0, 3.0, 5.0], [False, True, True])
    >>> fitted.scale, fitted.offset
    (2.0, 1.0)
    """
    x, y = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    if kind == "isotonic":
        return fit_isotonic(x, y)
    if kind == "affine":
        if x.ndim != 1 or x.shape != y.shape or not x.size:
            raise UserError(f"scores of shape {x.shape} do not fit values of shape {y.shape}")
        centred = x - x.mean()
        spread = float(centred @ centred)
        # Not below zero: a falling map would reverse the order of scores.
        slope = max(0.0, float(centred @ y) / spread) if spread > 0 else 0.0
        return AffineMap(slope, float(y.mean() - slope * x.mean()))
    if kind == "logistic":
        # Equal log likelihood ratios, a x + b = c y + d, solved for y.
        ours, theirs = fit_logistic(x, labels), fit_logistic(y, labels)
        if theirs.scale <= 0:
            raise UserError("the reference scores targets below nontargets: no logistic map")
        slope = max(0.0, ours.scale / theirs.scale)
        return AffineMap(slope, (ours.offset - theirs.offset) / theirs.scale)
    raise UserError(f"map {kind!r} must be one of {', '.join(MAPS)}")
