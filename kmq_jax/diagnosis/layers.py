"""Weight distortion of every quantized tensor, and how well it predicts the damage to scores."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.files import Json, Row
from kmq_jax.core.tree import Leaf, Params, Variables, named_leaves
from kmq_jax.diagnosis.correlation import spearman
from kmq_jax.metrics.bootstrap import percentile_interval
from kmq_jax.metrics.detection import Array
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.quant.codes import to_groups
from kmq_jax.quant.types import HALF

OUTLIER = 3.0
"""Weights farther than so many standard deviations from the mean of their group (output channel) are outliers."""

PREDICTORS = {
    "relative_error": "relative error",
    "sqnr_db": "weight SQNR (negated)",
    "cosine": "weight cosine (negated)",
    "codebook_use": "codebook use (negated)",
    "entropy": "index entropy (negated)",
    "effective_bits": "effective bits (negated)",
    "outlier_share": "outlier share",
    "hessian_trace": "Hessian trace",
    "predicted_loss": "Hessian trace × error",
    "activation_sqnr_db": "activation SQNR of the block (negated)",
}
"""What is correlated with damage, and what a table calls it. Negated where less of it should mean more damage."""
_NEGATED = {name for name, title in PREDICTORS.items() if title.endswith("(negated)")}


def weight_row(reference: Array, leaf: Leaf, bits: int | None = None) -> Json:
    """Distortion of one tensor.

    Args:
        reference: the full-precision tensor.
        leaf: the `CodebookTensor` in its place, or an array.
        bits: at which a nested tensor is read.

    Returns:
        `relative_error` ||Q - W|| / ||W||; `sqnr_db` 10 lg(||W||^2 / ||Q - W||^2), infinite for a copy; `cosine` of the
        angle between W and Q, 0 where one of them is all zeros; `squared_error`; `outlier_share` of W (see `OUTLIER`);
        `tensor_bits`, 16 of half precision, None of full. Of a codebook tensor also `codebook_use`, the share of
        codebook entries that some weight uses; `entropy`, the mean over codebooks of the indices' entropy in bits;
        `effective_bits`, indices and codebooks together in bits a weight.

    >>> row = weight_row(np.array([[3.0, 4.0]]), np.array([[3.0, 3.5]]))
    >>> row["relative_error"], row["sqnr_db"], row["squared_error"]
    (0.1, 20.0, 0.25)
    """
    packed = quant.is_codebook_tensor(leaf)
    read_at = bits if packed and leaf.coarse and bits in leaf.all_bits else None
    full: Leaf = np.asarray(reference, np.float64)  # also what `to_groups` gives back for one
    values = np.asarray(quant.dequantize_params({"x": leaf}, read_at)["x"], np.float64)
    error, power = float(np.sum((values - full) ** 2)), float(np.sum(full**2))
    groups = to_groups(full, leaf.axis if packed else full.ndim - 1)
    spread = np.abs(groups - groups.mean(1, keepdims=True)) > OUTLIER * groups.std(1, keepdims=True)
    length = np.sqrt(power * float(np.sum(values**2)))
    alike = float(not error)  # where both are all zeros, Q is a copy as well
    half = not packed and leaf.dtype.name in ("float16", "bfloat16")
    row: Json = {
        "relative_error": float(np.sqrt(error / power)) if power else float("inf") if error else 0.0,
        "sqnr_db": _decibels(power, error),
        "cosine": float(min(np.sum(full * values) / length, 1.0)) if length else alike,
        "squared_error": error,
        "outlier_share": float(spread.mean()),
        "tensor_bits": HALF if half else None,
        "codebook_use": None,
        "entropy": None,
        "effective_bits": None,
    }
    return row | _codebook_row(leaf, read_at) if packed else row


def _decibels(power: float, error: float) -> float:
    if not error:
        return float("inf")
    return float(10 * np.log10(power / error)) if power else float("-inf")


def more_bits(rows: Sequence[Row], bits: float) -> list[Json]:
    """Rules that give one bit more to the layers that do half of the damage with the fewest weights.

    Damage was measured with each layer quantized alone. Whether the added bits are worth their cost must be measured,
    on a model made by `quantize --rules`.

    Args:
        rows: of the table `layers`.
        bits: of the model in question.

    Returns:
        A rule for each layer, as `quantize --rules` reads them; none where damage was not measured.

    >>> layers = [("a", 100, 4.0), ("b", 900, 5.0), ("c", 500, 1.0)]
    >>> rows = [{"layer": n, "weights": w, "damage": d, "bits": 2, "tensor_bits": 2} for n, w, d in layers]
    >>> [(rule["pattern"], rule["bits"]) for rule in more_bits(rows, 2)]
    [('^a/kernel$', 3), ('^b/kernel$', 3), ('^c/kernel$', 2)]
    """
    here = [row for row in rows if row["bits"] == bits]
    packed = [row for row in here if row["tensor_bits"] not in (None, HALF)]
    if any(row["damage"] is None for row in packed):
        return []
    half, done, raised = sum(row["damage"] for row in packed) / 2, 0.0, set()
    for row in sorted(packed, key=lambda row: row["damage"] / row["weights"], reverse=True):
        if done < half:
            raised.add(row["layer"])
            done += row["damage"]
    return [
        {
            "pattern": f"^{re.escape(row['layer'])}/kernel$",
            # What has no codebook stays as it is; 8 bits are the most that a codebook has.
            "bits": min(row["tensor_bits"] + 1, 8) if row["layer"] in raised else row["tensor_bits"],
        }
        for row in here
    ]


def _codebook_row(leaf: quant.CodebookTensor, bits: int | None) -> Json:
    """What only a codebook tensor has; see `weight_row`."""
    here = bits or leaf.bits
    shares = index_shares(np.asarray(to_groups(quant.indices_of(leaf, bits), leaf.axis)), 1 << here)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    codebook = leaf.codebook_of(bits)
    stored = leaf.size * here + 8 * codebook.size * codebook.dtype.itemsize
    return {
        "tensor_bits": here,
        "codebook_use": float(np.mean(shares > 0)),
        "entropy": float(np.mean(-np.sum(shares * logs, axis=1))) + 0.0,  # of -0.0 this makes 0.0
        "effective_bits": stored / leaf.size,
    }


def index_shares(indices: Array, entries: int) -> Array:
    """The share of each codebook entry among the indices of each group: `[groups, n]` to `[groups, entries]`.

    >>> index_shares(np.array([[0, 0, 1, 3]]), entries=4).tolist()
    [[0.5, 0.25, 0.0, 0.25]]
    """
    groups = len(indices)
    # Each group's indices get a range of their own, so that one count serves all.
    codes = indices.astype(np.int64) + entries * np.arange(groups)[:, None]
    return np.bincount(codes.ravel(), minlength=groups * entries).reshape(groups, entries) / indices.shape[1]


def hessian_traces(
    network: SpeakerNetwork,
    variables: Variables,
    features: jax.Array,
    names: Sequence[str],
    draws: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Hessian trace of each tensor, for the loss that matters to quantization: how far embeddings turn.

    The loss is the mean of 1 - cos between an utterance's embedding and the reference's own. It needs no labels. At the
    reference, it and its gradient are zero, so that its leading term is that of second order.

    Args:
        network: the network, in float32.
        variables: of the reference.
        features: `[batch, time, mel]`, no frame padded.
        names: the tensors, by their names below `params`.
        draws: random vectors of Hutchinson's method.
        seed: of the draws.

    Returns:
        Traces by the tensors' names.
    """

    def embed(params: Params) -> jax.Array:
        embeddings: Leaf = network.apply({**variables, "params": params}, features, train=False)
        return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)

    here = jax.lax.stop_gradient(jax.jit(embed)(variables["params"]))
    return quant.hessian_traces(
        lambda params: jnp.mean(1 - jnp.sum(embed(params) * here, axis=-1)),
        variables["params"],
        jax.random.key(seed),
        draws=draws,
        names=names,
    )


def correlation_rows(rows: Sequence[Row], damage: str = "damage", replicates: int = 1000, seed: int = 0) -> list[Json]:
    """How well each predictor ranks the layers by the damage that each does alone, at all bits.

    Args:
        rows: layers, with `bits`, the predictors and the damage; a row without damage does not count.
        damage: the key of the damage.
        replicates: draws of layers with replacement, for the interval.
        seed: of the draws.

    Returns:
        `bits, predictor, title, layers, spearman` (positive where the predictor says what it should), `spearman_ci95`,
        and `explained`, its square: the share of the ranks' variance that the predictor accounts for. No rows at bits
        where no layer has damage.
    """
    result = []
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        here = [row for row in rows if row["bits"] == bits and row.get(damage) is not None]
        for predictor, title in PREDICTORS.items() if here else ():
            some = [row for row in here if row.get(predictor) is not None]
            x = np.array([row[predictor] for row in some]) * (-1 if predictor in _NEGATED else 1)
            y = np.array([row[damage] for row in some])
            about = {"bits": bits, "predictor": predictor, "title": title, "layers": len(some)}
            result.append(about | _correlation(x, y, replicates, seed))
    return result


def _correlation(x: Array, y: Array, replicates: int, seed: int) -> Json:
    """Spearman's correlation of two columns with its interval; None for fewer than four layers, or all alike."""
    nothing = {"spearman": None, "spearman_ci95": None, "explained": None}
    value = float(spearman(x, y)) if len(x) >= 4 else float("nan")
    if np.isnan(value):
        return nothing
    # Layers are drawn, not trials: the question is whether another network's layers would be ranked as well.
    drawn = np.random.default_rng(seed).integers(len(x), size=(replicates, len(x)))
    found = spearman(x[drawn], y[drawn])
    found = found[~np.isnan(found)]
    interval = list(percentile_interval(found)) if len(found) > replicates / 2 else None
    return {"spearman": value, "spearman_ci95": interval, "explained": value**2}


def kernels_of(variables: Variables) -> list[str]:
    """Names below `params` of all kernels, quantized or not."""
    names = [name for name, _ in named_leaves(variables["params"], is_leaf=quant.is_codebook_tensor)]
    return [name for name in names if name.rpartition("/")[2] == "kernel"]
