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
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap, fit_isotonic, fit_logistic, map_from_dict

VERSION = 1
Gate = tuple[float, float]


@dataclass(frozen=True, eq=False)
class CascadePolicy:
    """A cascade of levels. Each level has its bits and a map to the reference's scores; all but the last have a gate.

    A trial is scored at the first level. If the mapped score lies inside the gate, `low < score < high`, the trial is
    in doubt and climbs to the next level. If not, it stops there, and is accepted if `score >= threshold`. So a gate
    `(threshold, threshold)` stops every trial, and `(-inf, inf)` stops none. The paper's gates are symmetric:
    `(threshold - t, threshold + t)`. Here the two sides may differ.

    Attributes:
        bits: bits of each level, ascending.
        maps: each level's map from its scores to the reference's.
        gates: `(low, high)` of each level but the last, around the threshold.
        threshold: on the reference's scale.
        llr_maps: each level's map from reference scale to natural log likelihood ratio; None where it was not fitted.
        enrolment: "each": both sides at the level's bits; "top": the enrolled side always at the last level's.
        models: what is known of each level's model, None or its fingerprint.
        dims: each level's embedding size, None where unknown.
        notes: how the policy came about: for people, not used by the cascade.
        seconds: what a recording takes at each level, where gates were chosen by it: bits of different networks say
            little of what they compute. None elsewhere.
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

    def __post_init__(self) -> None:
        levels = len(self.bits)
        for name in ("models", "dims"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * levels)
        sizes = [len(self.maps), len(self.gates) + 1, len(self.models), len(self.dims)]
        if levels < 1 or set(sizes) != {levels} or len(self.llr_maps or self.maps) != levels:
            raise UserError(f"a policy of {levels} bits needs as many maps and one gate less")
        if any(a >= b for a, b in zip(self.bits, self.bits[1:])) or self.bits[0] < 1:
            raise UserError(f"the bits of a cascade must ascend, got {self.bits}")
        if not math.isfinite(self.threshold):
            raise UserError(f"the threshold (={self.threshold}) must be finite")
        for bits, (low, high) in zip(self.bits, self.gates):
            if not low <= self.threshold <= high:
                raise UserError(f"the gate ({low}, {high}) of {bits} bits must hold the threshold {self.threshold}")
        if self.seconds is not None and (len(self.seconds) != levels or not _positive(self.seconds)):
            raise UserError(f"`seconds` (={self.seconds}) must be a number above zero for each of {levels} levels")
        if self.enrolment not in ENROLMENTS:
            raise UserError(f"enrolment {self.enrolment!r} must be one of {', '.join(ENROLMENTS)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON. An infinite side of a gate is null."""
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
                "levels": levels,
                "notes": self.notes,
            },
        )

    def check(self, bits: int, level: int, dim: int, model: str | None, source: str) -> None:
        """Refuses embeddings that the policy was not made for.

        Args:
            bits: claimed for the embeddings.
            level: their place in the cascade.
            dim: their dimensions.
            model: fingerprint of their model, where known.
            source: the file, for messages.

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
    """Reads what `CascadePolicy.save` wrote.

    Raises:
        UserError: the file is missing, no policy, of a later version, or has impossible values; it names the file.
    """
    value = read_json(path)
    try:
        if not isinstance(value, dict) or value.get("kind") != "cascade policy":
            raise UserError("it is no cascade policy")
        if value["version"] != VERSION:
            raise UserError(f"its version is {value['version']}, this program reads version {VERSION}")
        levels = value["stages" if "stages" in value else "levels"]  # what levels were once called
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
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{Path(path)}: {what}") from error


def _positive(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{value!r} is not a whole number")
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
    """The paper's gates: a trial climbs where it is nearer the threshold than a distance, `[levels - 1]`.

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
        UserError: the kind is unknown, or "logistic" lacks target or nontarget trials or a reference that tells them
            apart.

    >>> fitted = fit_map("affine", [0.0, 1.0, 2.0], [1.0, 3.0, 5.0], [False, True, True])
    >>> fitted.scale, fitted.offset
    (2.0, 1.0)
    """
    x, y = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    if kind == "isotonic":
        return fit_isotonic(x, y)
    if kind == "affine":
        centred = x - x.mean()
        spread = float(centred @ centred)
        # Not below zero: a map that falls would turn scores over.
        slope = max(0.0, float(centred @ y) / spread) if spread > 0 else 0.0
        return AffineMap(slope, float(y.mean() - slope * x.mean()))
    if kind == "logistic":
        ours, theirs = fit_logistic(x, labels), fit_logistic(y, labels)
        if theirs.scale <= 0:
            raise UserError("the reference scores targets below nontargets: no logistic map")
        slope = max(0.0, ours.scale / theirs.scale)
        return AffineMap(slope, (ours.offset - theirs.offset) / theirs.scale)
    raise UserError(f"map {kind!r} must be one of {', '.join(MAPS)}")
