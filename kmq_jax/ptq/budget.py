"""Bits by layer within a budget, without training: measured once, allocated exactly, for any budget.

A tensor's sensitivity is the mean of the Hessian's diagonal over its weights. The loss is one minus the cosine to the
full-precision embedding, on a few crops of speech. A tensor's damage at so many bits is half its sensitivity times the
squared error of its k-means codebook. All tensors then get the bits of the least total damage within the budget
(HAWQ-V2, see `quant.sensitivity`). The same measurements serve every budget.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, write_json
from kmq_jax.core.tree import Params, named_leaves
from kmq_jax.models.speaker_model import SpeakerModel

BITS = (2, 3, 4, 5, 6)
"""Numbers of bits that a tensor may get."""
CROPS = 8
"""Crops that the Hessian is measured on."""
_DRAWS = 8  # random vectors that its traces are estimated by
HEADER = 256
"""Bytes that a file takes for an array's name, type and place."""


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """What an allocation needs to know of each tensor, by name.

    Attributes:
        model: what was measured, from `mark_of`.
        traces: of the Hessian, divided by the tensor's elements.
        errors: squared error by bits.
        sizes: bytes of indices and codebooks by bits.
        weights: elements.
        rest: bytes of everything that is not quantized at any bits.
    """

    model: str
    traces: Mapping[str, float]
    errors: Mapping[str, Mapping[int, float]]
    sizes: Mapping[str, Mapping[int, float]]
    weights: Mapping[str, int]
    rest: int

    def to_json(self) -> Json:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Row) -> "Sensitivities":
        """From JSON.

        Raises:
            UserError: something is missing, or is not what it should be.
        """
        try:
            errors, sizes = (
                {name: {int(bits): float(value) for bits, value in row.items()} for name, row in found[key].items()}
                for key in ("errors", "sizes")
            )
            traces = {name: float(value) for name, value in found["traces"].items()}
            weights = {name: int(value) for name, value in found["weights"].items()}
            if not set(errors) == set(sizes) == set(traces) == set(weights) != set():
                raise KeyError("a tensor")
            if len({frozenset(row) for row in (*errors.values(), *sizes.values())}) != 1:
                raise ValueError("`errors` and `sizes` are not of the same numbers of bits")
            return cls(str(found["model"]), traces, errors, sizes, weights, int(found["rest"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"these are no sensitivities: {error}") from error

    def damage(self, bits_of: Mapping[str, int]) -> float:
        """The predicted loss of cosine."""
        # Half: the second-order term of the Taylor series. Below zero a trace is noise of its estimate.
        return sum(max(self.traces[name], 0.0) * self.errors[name][bits] for name, bits in bits_of.items()) / 2

    def bytes_of(self, bits_of: Mapping[str, int]) -> int:
        """Bytes of the file, by estimate."""
        return self.rest + round(sum(self.sizes[name][bits] for name, bits in bits_of.items()))

    def average(self, bits_of: Mapping[str, int]) -> float:
        """Bits of an index, on average over the weights."""
        return sum(bits * self.weights[name] for name, bits in bits_of.items()) / sum(self.weights.values())

    def figures(self, bits_of: Mapping[str, int]) -> Json:
        """An allocation as `average_bits`, `bytes` and `damage`."""
        return {
            "average_bits": self.average(bits_of),
            "bytes": self.bytes_of(bits_of),
            "damage": self.damage(bits_of),
        }


def mark_of(fingerprint: str, rules: Sequence[quant.QuantRule], data: str) -> str:
    """Sixteen hexadecimal digits that tell what was measured: the model, the tensors, their codebooks and the data.

    Args:
        fingerprint: the model's.
        rules: which tensors; the bits in them do not matter.
        data: as in `quantize_model`.

    >>> by_two, by_four = ([quant.QuantRule("kernel$", quant.QuantSpec(bits))] for bits in (2, 4))
    >>> mark_of("model", by_two, "speech") == mark_of("model", by_four, "speech")
    True
    """
    # bits=8 stands for any, so that specs which differ in bits alone are equal.
    kinds = [[rule.pattern, rule.spec and dataclasses.asdict(dataclasses.replace(rule.spec, bits=8))] for rule in rules]
    return hashlib.sha256(json.dumps([fingerprint, kinds, data]).encode()).hexdigest()[:16]


def loss_of(reference: SpeakerModel, quantized: SpeakerModel, features: jax.Array) -> float:
    """One minus the cosine of two models' embeddings, on average over features `[batch, time, mel]`."""

    def embedded(model: SpeakerModel) -> np.ndarray:
        variables = quant.dequantize_params(model.variables, model.bits, np.float32)
        rows = np.asarray(model.network().without_remat().apply(variables, features, train=False), np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return float(np.mean(1 - np.sum(embedded(reference) * embedded(quantized), axis=1)))


def measure(
    model: SpeakerModel, mark: str, rules: quant.transform.Rules, features: jax.Array, draws: int = _DRAWS
) -> Sensitivities:
    """Measures every tensor that rules quantize.

    Args:
        model: in full precision.
        mark: from `mark_of`.
        rules: which tensors; the bits in them do not matter.
        features: `[batch, time, mel]`; the first crops are used.
        draws: random vectors that traces are estimated by.

    Returns:
        Sensitivities, errors and sizes of these tensors, and the bytes of the rest of the file: with biases in float32
        and activations in floating point, see `quantize.extra_bytes`.

    Raises:
        UserError: no tensor would shrink.
    """
    network = model.network().without_remat()
    crops = features[:CROPS]
    variables = model.variables
    exact = network.apply(variables, crops, train=False)
    exact = exact / jnp.linalg.norm(exact, axis=1, keepdims=True)

    def loss(params: Params) -> jax.Array:
        embeddings = network.apply({**variables, "params": params}, crops, train=False)
        norms = jnp.linalg.norm(embeddings, axis=1)
        return jnp.mean(1 - jnp.sum(embeddings * exact, axis=1) / norms)

    params = variables["params"]
    leaves = dict(named_leaves(params))
    errors, sizes = quant.distortions(params, rules, BITS)
    if not errors:
        raise UserError("none of the model's tensors that the rules name would shrink")
    whole = quant.hessian_traces(loss, params, jax.random.key(0), draws=draws, names=list(errors))
    # Rounding errors are spread over a tensor, so what counts is the mean of the diagonal.
    traces = {name: trace / leaves[name].size for name, trace in whole.items()}
    kept = [leaf for name, leaf in named_leaves(variables) if name.removeprefix("params/") not in errors]
    rest = sum(np.asarray(leaf).nbytes for leaf in kept)
    arrays = len(named_leaves(variables)) + 2 * len(errors)
    weights = {name: int(leaves[name].size) for name in errors}
    return Sensitivities(mark, traces, errors, sizes, weights, rest + HEADER * arrays)


def allocate(found: Sensitivities, average: float | None = None, size: int | None = None) -> dict[str, int]:
    """The bits of each tensor, of the least predicted damage.

    Args:
        found: from `measure`.
        average: bits of an index, on average over the weights.
        size: or else bytes of the file.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: even the fewest bits exceed the budget.
    """
    if size is not None:
        least = found.rest + sum(min(row.values()) for row in found.sizes.values())
        if least > size:
            raise UserError(f"`size` (={size} bytes) is too small: at the fewest bits the file takes {least:.0f}")
        return quant.allocate(found.traces, found.errors, found.sizes, size - found.rest)
    assert average is not None
    fewest = min(min(row) for row in found.errors.values())
    if average < fewest:
        raise UserError(f"`budget` (={average:g}) must be at least {fewest}, the fewest bits")
    # An average counts indices alone, without codebooks; both sides are in bytes.
    indices = {name: {bits: bits * found.weights[name] / 8 for bits in row} for name, row in found.sizes.items()}
    budget = average * sum(found.weights.values()) / 8
    return quant.allocate(found.traces, found.errors, indices, budget)


def curve(found: Sensitivities, points: int = 17) -> list[Json]:
    """The whole range of budgets, ascending: `Sensitivities.figures` of the allocation for each."""
    bits = next(iter(found.errors.values()))
    averages = np.linspace(min(bits), max(bits), points).tolist()
    return [found.figures(allocate(found, average=average)) for average in averages]


def describe(rows: list[Json], taken: Json) -> str:
    """The curve, and the allocation that was taken, as lines for the terminal."""
    lines = [f"{'bits':>6} {'MB':>7}  predicted loss of cosine"]
    lines += [f"{row['average_bits']:6.2f} {row['bytes'] / 1e6:7.2f}  {row['damage']:.4f}" for row in rows]
    return "\n".join(
        [*lines, f"taken: {taken['average_bits']:.2f} bits, {taken['bytes'] / 1e6:.2f} MB, {taken['damage']:.4f}"]
    )


def report(found: Sensitivities, bits_of: Mapping[str, int], out: Path) -> str:
    """Describes the curve in lines for the terminal, and writes two files beside a model's file `out`.

    They are a picture of the curve (`.budget.png`), and the bits of each tensor as a file of rules (`.rules.json`).
    """
    rows, taken = curve(found), found.figures(bits_of)
    plot(rows, taken, out.with_suffix(".budget.png"))
    # Names of imported graphs have dots, which stand for any letter.
    rules = [{"pattern": f"^{re.escape(name)}$", "bits": bits} for name, bits in bits_of.items()]
    write_json(out.with_suffix(".rules.json"), rules)
    return describe(rows, taken)


def plot(rows: list[Json], chosen: Json, path: Path) -> None:
    """Draws predicted damage against size, and the allocation that was taken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["bytes"] / 1e6 for row in rows], [row["damage"] for row in rows], marker=".")
    axes.plot([chosen["bytes"] / 1e6], [chosen["damage"]], marker="o")
    axes.set(xlabel="file, MB", ylabel="predicted loss of cosine", yscale="log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def bytes_from(text: str) -> int:
    """Reads a size such as "2MB", "900kB" or "1500000", in bytes.

    >>> bytes_from("1.8MB"), bytes_from("900kB"), bytes_from("1500000")
    (1800000, 900000, 1500000)

    Raises:
        UserError: it is no size, or less than one byte.
    """
    # The longest suffixes first: "B" ends all of them, and "" ends every text.
    for suffix, unit in (("MB", 1e6), ("kB", 1e3), ("KB", 1e3), ("B", 1.0), ("", 1.0)):
        if text.endswith(suffix):
            try:
                size = int(float(text.removesuffix(suffix)) * unit)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise UserError(f"`size` (={text}) must be a number of bytes, such as 2MB")
