"""Quantization-aware training: exact centroids forward, straight-through gradients backward.

In training a quantized tensor has two parts: a full-precision latent in the parameter tree, and a `Codebook` by the
leaf's name. `init_codebooks` makes both. `fake_quantize` gives the weights that the network computes with. `pack` turns
both into the packed tensors of `transform.quantize_params`, with exactly the same values.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Leaf, Params, map_named, named_leaves, replace_named
from kmq_jax.quant.codes import along, assign, from_groups, known_now, lookup, to_groups, where_sorted
from kmq_jax.quant.kmeans import kmeans, midpoints, nearest_to_zero
from kmq_jax.quant.nested import split_kmeans, thresholds
from kmq_jax.quant.packing import pack_bits
from kmq_jax.quant.rules import Rules, decide, group_axis
from kmq_jax.quant.transform import fit_codebooks
from kmq_jax.quant.types import HALF, CodebookTensor, QuantSpec, is_codebook_tensor, is_whole, storage_type

RECIPES = ("normalized", "weights")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codebook:
    """What turns a latent tensor into quantized weights: weight = scale * nearest centroid.

    Attributes:
        raw_scale: `[groups]`; softplus of it is the scale, which stays positive however it is trained.
        centroids: `[groups, 2^bits]`, in units of the scale.
        coarse: nested centroids of fewer bits `[groups, 2^b]`, ascending in b.
        indices: uint8 in the latent's shape, to be used until the next `reassign`; None assigns afresh each time.
        kept: 0, or the fewest bits of nested codebooks whose `indices` stay as they are. At more bits a latent is then
            assigned afresh each time, to one of the centroids inside its cell. See `grow_codebooks`.
        axis: the latent's axis that groups lie along; None is one group.
        normalized: the latent is in units of the scale too (its gradient is then scaled likewise); otherwise it is in
            units of the weights, as in KMQAT.
        symmetric, pinned_zero: constraints that hold throughout training.
        dtype: the type centroids times scale are rounded to, so that training sees what `pack` stores.
        latent_dtype: the type of the parameters before, which `pack` notes.

    >>> latents, books = init_codebooks({"kernel": jnp.linspace(-1.0, 1.0, 128).reshape(64, 2)}, QuantSpec(bits=2))
    >>> books["kernel"]
    Codebook(groups=2, bits=2, axis=1, float16)
    """

    raw_scale: jax.Array
    centroids: jax.Array
    coarse: tuple[jax.Array, ...] = ()
    indices: jax.Array | None = None
    kept: int = dataclasses.field(default=0, metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    normalized: bool = dataclasses.field(default=False, metadata={"static": True})
    symmetric: bool = dataclasses.field(default=False, metadata={"static": True})
    pinned_zero: bool = dataclasses.field(default=False, metadata={"static": True})
    dtype: str = dataclasses.field(default="float16", metadata={"static": True})
    latent_dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def __repr__(self) -> str:
        nested = f", coarse={self.all_bits[:-1]}" if self.coarse else ""
        return f"Codebook(groups={self.centroids.shape[0]}, bits={self.bits}{nested}, axis={self.axis}, {self.dtype})"

    @property
    def scale(self) -> jax.Array:
        """The positive scale `[groups]`."""
        return jax.nn.softplus(self.raw_scale)

    @property
    def bits(self) -> int:
        """The most bits."""
        return self.centroids.shape[-1].bit_length() - 1

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Every number of bits, ascending."""
        return (*(c.shape[-1].bit_length() - 1 for c in self.coarse), self.bits)

    def with_scale(self, scale: jax.Array) -> "Codebook":
        """The same codebook with another scale `[groups]`, above zero."""
        # The inverse of softplus, accurate for small and for large scales.
        return dataclasses.replace(self, raw_scale=scale + jnp.log(-jnp.expm1(-scale)))

    def constrained(self) -> tuple[jax.Array, ...]:
        """The centroids at all bits as they are used: in order, and with the constraints met."""
        books = []
        for centroids in (*self.coarse, self.centroids):
            # Sorted within the kept cells alone: across them centroids need not ascend.
            cells = centroids.reshape(centroids.shape[0], 1 << self.kept, -1)
            book = jnp.sort(cells, axis=-1).reshape(centroids.shape)  # a gradient step may let two of them cross
            if self.symmetric:
                book = 0.5 * (book - jnp.flip(book, -1))
            if self.pinned_zero:
                place = jnp.arange(book.shape[-1])[None, :]
                zero = place == jax.vmap(nearest_to_zero)(book)[:, None]
                # With the mirror image of one, both middle ones are 0.
                book = jnp.where(zero | jnp.flip(zero, -1) if self.symmetric else zero, 0.0, book)
            books.append(book)
        return tuple(books)

    def values(self, bits: int | None = None) -> jax.Array:
        """The values that weights can take at `bits` (default: the most): `[groups, 2^bits]`, as `pack` stores them.

        Raises:
            UserError: there is no codebook of `bits`.
        """
        if bits is not None and bits not in self.all_bits:
            raise UserError(f"no codebook of {bits} bits: there is {', '.join(map(str, self.all_bits))}")
        book = self.constrained()[-1 if bits is None else self.all_bits.index(bits)]
        return _rounded(self.scale[:, None] * book, self.dtype)

    def table(self, bits: jax.Array) -> jax.Array:
        """As `values`, but for traced `bits`, and looked up by the index at the most bits: `[groups, 2^self.bits]`."""
        # All indices that begin with the same `b` bits share a value.
        tables = [jnp.repeat(self.values(b), 1 << (self.bits - b), axis=1) for b in self.all_bits]
        return jnp.stack(tables)[jnp.searchsorted(jnp.array(self.all_bits), bits, method="compare_all")]

    def units(self, latent: jax.Array) -> jax.Array:
        """The latent in units of the centroids."""
        return latent if self.normalized else latent / along(self.scale, latent.ndim, self.axis)

    def assigned(self, latent: jax.Array) -> jax.Array:
        """The index of each latent's centroid, uint8 in the latent's shape, computed afresh."""
        units, borders = self.units(latent), inner_borders(self.constrained(), self.kept)
        if not self.kept:
            return assign(units, borders[:, 0], self.axis)  # one cell holds all
        assert self.indices is not None
        index = self.indices << (self.bits - self.kept)
        # Inside its cell an index counts the borders that the latent lies above.
        for part in range(borders.shape[-1]):
            index += (units > lookup(self.indices, borders[:, :, part], self.axis)).astype(jnp.uint8)
        return index

    def index_of(self, latent: jax.Array) -> jax.Array:
        """The index of each latent's centroid, uint8 in the latent's shape: the cached one, else computed afresh."""
        return self.assigned(latent) if self.indices is None or self.kept else self.indices


Codebooks = Mapping[str, Codebook]


def inner_borders(books: tuple[jax.Array, ...], kept: int) -> jax.Array:
    """Borders inside the cells at `kept` bits: `[groups, 2^kept, parts - 1]`; with 0 kept bits all is one cell.

    Args:
        books: centroids `[groups, 2^b]`, in ascending bits, those of `kept` first.
        kept: bits of the cells.
    """
    cells = 1 << kept
    finer = tuple(book.reshape(len(book) * cells, -1) for book in (books[1:] if kept else books))
    return thresholds(finer).reshape(len(books[0]), cells, -1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(values: jax.Array, dtype: str) -> jax.Array:
    """Rounds to `dtype` and back to float32; gradients pass as though it did nothing."""
    return values.astype(dtype).astype(jnp.float32)


@_rounded.defjvp
def _rounded_jvp(dtype: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _rounded(*primals, dtype), tangents[0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def straight_through(
    latent: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    slope: jax.Array,
    axis: int | None,
    reduction: str,
) -> jax.Array:
    """The codebook's values forward, exactly; backward as though the latent had passed through.

    The common form `w + stop_gradient(q - w)` gives the centroids only up to rounding.

    >>> def total(latent):
    ...     weights = straight_through(latent, jnp.array([[0.0, 1.0]]), jnp.uint8([0, 1]), jnp.ones(1), None, "sum")
    ...     return jnp.sum(weights * jnp.array([3.0, 5.0]))
    >>> value, gradient = jax.value_and_grad(total)(jnp.array([0.1, 0.8]))
    >>> float(value), gradient.tolist()
    (5.0, [3.0, 5.0])

    Args:
        latent: any shape.
        values: `[groups, K]`.
        indices: uint8, the latent's shape.
        slope: what the latent's gradient is multiplied by; broadcasts against the latent. Not differentiated.
        axis: where groups lie; None is one group.
        reduction: "sum" gives each centroid the sum of its members' gradients, which is the true one; "mean" their
            mean, which keeps the step independent of how many members there are.

    Returns:
        The values at the indices, in the latent's shape.
    """
    return lookup(indices, values, axis)


def _forward(latent, values, indices, slope, axis, reduction):
    return lookup(indices, values, axis), (indices, slope, values.shape[1])


def _backward(axis, reduction, residuals, gradient):
    indices, slope, k = residuals
    count, total = cell_sums(gradient, indices, k, axis, counted=reduction == "mean")
    # Indices are whole numbers and the slope is given: nothing flows back to either.
    return gradient * slope, total / jnp.maximum(count, 1) if reduction == "mean" else total, None, None


straight_through.defvjp(_forward, _backward)


def cell_sums(
    tensor: jax.Array, indices: jax.Array, k: int, axis: int | None, counted: bool = True
) -> tuple[jax.Array, jax.Array]:
    """The number of members of each cell (zeros unless `counted`) and their sum, both `[groups, k]`.

    >>> count, total = cell_sums(jnp.array([1.0, 2.0, 4.0]), jnp.uint8([0, 1, 1]), 2, None)
    >>> count.tolist(), total.tolist()
    ([[1.0, 2.0]], [[1.0, 6.0]])
    """
    groups = 1 if axis is None else tensor.shape[axis]
    if jax.default_backend() == "cpu":
        # One pass, in a fixed order; elsewhere a scatter adds in any order, and k masked sums are as fast.
        cell = along(k * jnp.arange(groups), tensor.ndim, axis) + indices.astype(jnp.int32)

        def total(x: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(x.reshape(-1), cell.reshape(-1), groups * k).reshape(groups, k)

        sums = total(tensor)
        return total(jnp.ones_like(tensor)) if counted else jnp.zeros_like(sums), sums
    others = tuple(i + 1 for i in range(tensor.ndim) if i != axis)
    # [k, ...]: a mask of the tensor's shape for each cell.
    member = indices[None] == jnp.arange(k, dtype=indices.dtype).reshape(-1, *(1,) * tensor.ndim)
    sums = jnp.sum(jnp.where(member, tensor[None], 0), axis=others).reshape(k, groups).T
    counts = jnp.sum(member, axis=others, dtype=jnp.float32).reshape(k, groups).T
    return counts if counted else jnp.zeros_like(sums), sums


def fake_quantize(
    params: Params,
    codebooks: Codebooks,
    *,
    bits: int | jax.Array | None = None,
    clip: float | None = None,
    reduction: str = "sum",
) -> Params:
    """Gives the weights to compute with: every tensor that has a codebook takes its centroids' values, exactly.

    Differentiable in the parameters (straight-through), and in the codebooks' `raw_scale` and centroids; hold one
    fixed with `jax.lax.stop_gradient` or an optimizer's mask. With cached indices the codebooks hold integers: take
    gradients of `transform.partition(codebooks)[0]`.

    >>> latents, books = init_codebooks({"kernel": jnp.float32([[1, 2, 3, 4]])}, {"kernel": QuantSpec(1, "tensor")})
    >>> fake_quantize(latents, books)["kernel"].tolist()
    [[1.5, 1.5, 3.5, 3.5]]

    Args:
        params: the tree of latents, from `init_codebooks`.
        codebooks: by leaf name.
        bits: at how many bits nested codebooks are used; those that are not nested are used at their own. A scalar
            array makes one program that serves all bits.
        clip: the latent's gradient passes only up to `clip` times the outermost centroid; None lets all of it pass.
        reduction: of the centroids' gradients, "sum" or "mean"; see `straight_through`.

    Returns:
        The tree of `params`; leaves without a codebook are as they were.

    Raises:
        UserError: a codebook's name is not in the tree, or no codebook has `bits`.
    """
    if missing := set(codebooks) - {name for name, _ in named_leaves(params)}:
        raise UserError(f"a codebook is given for {sorted(missing)[0]}, which is not in the tree")
    if reduction not in ("sum", "mean"):
        raise UserError(f"reduction (={reduction!r}) must be sum or mean")
    if bits is not None and is_whole(bits):
        bits = int(bits)  # numpy's too
    # Traced bits are not known yet: only whole numbers can be refused.
    if isinstance(bits, int) and not any(bits in book.all_bits for book in codebooks.values()):
        raise UserError(f"no codebook has {bits} bits")

    def quantized(name: str, latent: jax.Array) -> jax.Array:
        book = codebooks.get(name)
        if book is None:
            return latent
        # Which centroid a latent takes, and where its gradient is cut, is not differentiated.
        fixed, held = jax.lax.stop_gradient((latent, book))
        indices = held.index_of(fixed)
        if bits is None or not book.coarse:
            values = book.values()
        elif isinstance(bits, int):
            values = book.values(bits)
            # Of a nested index the leading bits are the index at fewer bits.
            indices = indices >> (book.bits - bits)
        else:
            values = book.table(bits)
        slope = along(held.scale, latent.ndim, book.axis) if book.normalized else jnp.ones([1] * latent.ndim)
        if clip is not None:
            edge = clip * jnp.max(jnp.abs(held.centroids), axis=-1)
            inside = jnp.abs(held.units(fixed)) <= along(edge, latent.ndim, book.axis)
            slope = jnp.where(inside, slope, 0.0)
        return straight_through(latent, values, indices, slope, book.axis, reduction)

    return map_named(quantized, params)


def kmqat_codebook(rows: jax.Array, bits: int, retention: float = 0.9) -> tuple[jax.Array, jax.Array]:
    """The init of KMQAT: centroids of the central weights, and the scale that fits them best.

    The weights are clamped to their central `retention` quantiles and cut into 2^bits bins of equal mass. The means of
    the bins, divided by the largest magnitude among them, are the centroids. Each weight w, divided by the largest
    clamped magnitude, takes its nearest centroid q. The scale is <w, q> / <q, q>, at least 1e-5.

    Args:
        rows: weights `[groups, n]`.
        bits: bits of an index.
        retention: share of the weights that are not clamped.

    Returns:
        `(centroids [groups, 2^bits], scale [groups])`.

    >>> centroids, scale = kmqat_codebook(jnp.float32([[-2, -1, 1, 2]]), 1, retention=1.0)
    >>> centroids.tolist(), scale.tolist()
    ([[-1.0, 1.0]], [1.5])
    """
    rows = jnp.asarray(rows, jnp.float32)
    centroids = kmeans(rows, 1 << bits, init="equal-mass", retention=retention, iterations=0)
    largest = jnp.max(jnp.abs(centroids), axis=1, keepdims=True)
    centroids = centroids / jnp.where(largest > 0, largest, 1)
    near = lookup(assign(_clamped_units(rows, retention), midpoints(centroids), 0), centroids, 0)
    power = jnp.sum(near * near, axis=1)
    scale = jnp.sum(rows * near, axis=1) / jnp.where(power > 0, power, 1)
    return centroids, jnp.maximum(scale, 1e-5)


def kmqat_indices(latent: jax.Array, book: Codebook, retention: float = 0.9) -> jax.Array:
    """The indices that KMQAT begins with, uint8 in the latent's shape: see `kmqat_codebook`.

    The weight is divided by the largest clamped magnitude, and not by the scale, as it is later (`reassign`).

    Args:
        latent: as `init_codebooks` makes it by the recipe "weights".
        book: its codebook.
        retention: that by which the centroids were placed.

    >>> latents, books = init_codebooks({"w": jnp.float32([[-2, -1, 1, 2]])}, QuantSpec(1, "tensor"), recipe="weights")
    >>> kmqat_indices(latents["w"], books["w"]).tolist()
    [[0, 0, 1, 1]]
    """
    rows = to_groups(latent, book.axis)
    index = assign(_clamped_units(rows, retention), midpoints(book.constrained()[-1]), 0)
    return from_groups(index, tuple(latent.shape), book.axis)


def _clamped_units(rows: jax.Array, retention: float) -> jax.Array:
    """Weights `[groups, n]` over the largest magnitude of their central `retention`, clipped to +-1."""
    tails = jnp.array([(1 - retention) / 2, (1 + retention) / 2])
    clamped = jnp.max(jnp.abs(jnp.quantile(rows, tails, axis=1)), axis=0)[:, None]
    return jnp.clip(rows / jnp.where(clamped > 0, clamped, 1), -1, 1)


def init_codebooks(
    params: Params,
    rules: Rules | None = None,
    *,
    bits: int | None = None,
    recipe: str = "normalized",
    cached: bool = False,
) -> tuple[Params, dict[str, Codebook]]:
    """Makes latents and codebooks to train from full-precision parameters.

    >>> latents, books = init_codebooks({"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, bits=2)
    >>> books
    {'kernel': Codebook(groups=4, bits=2, axis=1, float16)}

    Args:
        params: tree of arrays.
        rules: see `transform.quantize_params`; tensors at 16 bits are left alone.
        bits: in place of rules: this many for every leaf.
        recipe: "normalized", latents and centroids in units of the group's standard deviation, centroids by k-means;
            or "weights", latents in units of the weights, which begin as in KMQAT (`kmqat_codebook`). The init of
            constrained and nested codebooks is always k-means.
        cached: hold the indices until `reassign`, in place of assigning at every step.

    Returns:
        `(latents, codebooks)`: the tree of `params`, and `{name: Codebook}`.

    Raises:
        UserError: as `rules.decide`; a weight is not finite, or codebooks of its type cannot hold it (the message
            names the tensor); an unknown recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe (={recipe!r}) must be one of {', '.join(RECIPES)}")
    specs = {name: spec for name, spec in decide(params, rules, bits=bits).items() if spec.bits != HALF}
    leaves = dict(named_leaves(params))
    latents, codebooks = {}, {}
    for name, spec in specs.items():
        axis = group_axis(name, leaves[name].ndim, spec)
        try:
            with known_now(leaves[name]):
                latents[name], codebooks[name] = _begin(leaves[name], spec, axis, recipe)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if cached:
        codebooks = reassign(latents, codebooks)
    return replace_named(params, latents), codebooks


def _begin(leaf: Leaf, spec: QuantSpec, axis: int | None, recipe: str) -> tuple[jax.Array, Codebook]:
    """The latent and the codebook of one tensor."""
    tensor = where_sorted(leaf)
    rows = to_groups(tensor, axis)
    constrained = spec.levels != "kmeans" or spec.coarse or spec.symmetric or spec.pinned_zero
    books: tuple[jax.Array, ...]
    if recipe == "weights" and not constrained:
        centroids, scale = kmqat_codebook(rows, spec.bits, spec.retention)
        books = (centroids * scale[:, None],)
    else:
        books, scale = fit_codebooks(rows, spec), None
    spec = dataclasses.replace(spec, codebook_dtype=storage_type(books, spec))
    latent, codebook = _in_units(tensor, books, scale, spec, axis, recipe == "normalized")
    return latent, dataclasses.replace(codebook, latent_dtype=_type_of(leaf))


def _type_of(leaf: Leaf) -> str:
    return str(jax.dtypes.canonicalize_dtype(leaf.dtype).name)


def _unit(rows: jax.Array) -> jax.Array:
    """Powers of two `[groups, 1]` that bring each row's largest to 1 to 2, since squares of others may not fit float32.

    A product with them rounds nothing.
    """
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(jnp.frexp(largest)[1] - 1, -126, 126))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _in_units(
    tensor: jax.Array,
    books: tuple[jax.Array, ...],
    scale: jax.Array | None,
    spec: QuantSpec,
    axis: int | None,
    normalized: bool,
) -> tuple[jax.Array, Codebook]:
    """Brings codebooks, and a normalized latent, into units of the scale; None takes each group's deviation."""
    if scale is None:
        rows = to_groups(tensor, axis)
        largest, unit = jnp.max(jnp.abs(rows), axis=1), _unit(rows)
        spread = (jnp.std(rows / unit, axis=1, keepdims=True) * unit)[:, 0]
        # A constant group has no spread; its magnitude is then the unit.
        scale = jnp.where(spread > 1e-6 * largest, spread, jnp.where(largest > 0, largest, 1.0))
    books = tuple(book / scale[:, None] for book in books)
    book = Codebook(
        raw_scale=scale,  # replaced below
        centroids=books[-1],
        coarse=books[:-1],
        axis=axis,
        normalized=normalized,
        symmetric=spec.symmetric,
        pinned_zero=spec.pinned_zero,
        dtype=spec.codebook_dtype,
    )
    book = book.with_scale(scale)
    # By the scale as softplus gives it back, which is what `fake_quantize` multiplies by.
    return (tensor / along(book.scale, tensor.ndim, axis) if normalized else tensor), book


def adopt_codebooks(
    params: Params, packed: Params, rules: Rules, *, margin: float = 0.1
) -> tuple[Params, dict[str, Codebook]]:
    """Makes latents and codebooks that compute what a packed network does, to be trained from there.

    A latent is the full-precision weight, scaled channel by channel to the size of the packed values. Error feedback
    gives many weights another index than that of the nearest centroid. Their latents are moved just over the border of
    that index's cell, where the least gradient can send them back.

    >>> from kmq_jax.quant import dequantize_params, quantize_params
    >>> params = {"kernel": jnp.arange(32.0).reshape(16, 2)}
    >>> latents, books = adopt_codebooks(params, quantize_params(params, bits=2), {"kernel": 2})
    >>> bool(jnp.all(fake_quantize(latents, books)["kernel"] == dequantize_params(pack(latents, books))["kernel"]))
    True

    Args:
        params: the tree in full precision.
        packed: the tree of the same network, quantized by the same rules. Where codebooks nest, the indices of the
            fewest bits are kept, as in `grow_codebooks`, and inside their cells the centroids of more bits ascend.
        rules: see `transform.quantize_params`.
        margin: how far from its border into the cell a moved latent lies, as a share of the way to the centroid.

    Returns:
        `(latents, codebooks)` as `init_codebooks`, in units of each group's standard deviation; what `packed` does not
        quantize is as there. Where codebooks nest, the caller gives them their `indices`.

    Raises:
        UserError: a tensor is not quantized alike in `packed`, or is not there (the message names it).
    """
    leaves = dict(named_leaves(params))
    given = dict(named_leaves(packed, is_leaf=is_codebook_tensor))
    latents = {name: leaf for name, leaf in given.items() if not is_codebook_tensor(leaf)}
    codebooks = {}
    for name, spec in decide(params, rules).items():
        if spec.bits == HALF:
            continue
        axis = group_axis(name, leaves[name].ndim, spec)
        tensor = _alike(given.get(name), leaves[name].shape, axis)
        if tensor is None or tensor.all_bits != spec.all_bits:
            raise UserError(f"{name}: the packed network must hold it at {', '.join(map(str, spec.all_bits))} bits")
        kept = spec.all_bits[0] if spec.coarse else 0
        books = tuple(jnp.asarray(tensor.codebook_of(b), jnp.float32) for b in spec.all_bits)
        latent = _into_cells(jnp.asarray(leaves[name], jnp.float32), tensor.indices(), books, kept, axis, margin)
        latents[name], own = _in_units(latent, books, None, spec, axis, True)
        codebooks[name] = dataclasses.replace(
            own, kept=kept, dtype=str(tensor.codebook.dtype), latent_dtype=_type_of(leaves[name])
        )

    def adopted(name: str, leaf: Leaf) -> jax.Array:
        if name not in latents:
            how = "must be in full precision in" if name in given else "is missing in"
            raise UserError(f"{name} {how} the packed network")
        return jnp.asarray(latents[name], leaf.dtype)  # what is stored in half precision trains in its own

    return map_named(adopted, params), codebooks


def _alike(leaf: Leaf, shape: tuple[int, ...], axis: int | None) -> CodebookTensor | None:
    """The leaf where it is quantized in this shape along this axis, else None."""
    return leaf if is_codebook_tensor(leaf) and (leaf.shape, leaf.axis) == (tuple(shape), axis) else None


@partial(jax.jit, static_argnums=(3, 4))
def _into_cells(
    tensor: jax.Array, indices: jax.Array, books: tuple[jax.Array, ...], kept: int, axis: int | None, margin: float
) -> jax.Array:
    """Scales a tensor to the values of its indices in the finest codebook, and moves strays into their cells."""
    rows, index = to_groups(tensor, axis), to_groups(indices, axis)
    values = lookup(index, books[-1], 0)
    rows, unit = rows / _unit(rows), _unit(values)
    power = jnp.sum(rows * rows, axis=1, keepdims=True)
    # Least squares: the factor that brings a channel nearest to its packed values.
    rows = rows * (jnp.sum(rows * (values / unit), axis=1, keepdims=True) / jnp.where(power > 0, power, 1)) * unit
    borders = inner_borders(books, kept)
    ends = jnp.full((*borders.shape[:2], 1), jnp.inf)
    # The borders below and above each index's cell; none at the ends.
    low = lookup(index, jnp.concatenate([-ends, borders], axis=-1).reshape(books[-1].shape), 0)
    high = lookup(index, jnp.concatenate([borders, ends], axis=-1).reshape(books[-1].shape), 0)
    # A border that several codebooks share need not have the centroid on its own side.
    gap = 0.05 * jnp.minimum(jnp.std(rows / unit, axis=1, keepdims=True) * unit, high - low)
    inside = jnp.clip(values, low + gap, high - gap)
    low = jnp.where(jnp.isfinite(low), low + margin * (inside - low), low)
    high = jnp.where(jnp.isfinite(high), high - margin * (high - inside), high)
    return from_groups(jnp.clip(rows, low, high), tensor.shape, axis)


def grow_codebooks(params: Params, coarse: Params, rules: Rules) -> tuple[Params, dict[str, Codebook]]:
    """Makes latents and nested codebooks around a quantized network, which stays as it is at the fewest bits.

    Each weight keeps its index at the fewest bits. What more bits add to the index is clustered and trained within its
    cell, so the coarse network loses nothing by them.

    >>> from kmq_jax.quant import quantize_params
    >>> params = {"kernel": jnp.arange(32.0).reshape(16, 2)}
    >>> latents, books = grow_codebooks(params, quantize_params(params, bits=2), {"kernel": QuantSpec(4, coarse=(2,))})
    >>> books["kernel"], books["kernel"].kept
    (Codebook(groups=2, bits=4, coarse=(2,), axis=1, float16), 2)

    Args:
        params: the tree in full precision.
        coarse: the tree of a network quantized at one number of bits.
        rules: see `transform.quantize_params`; the fewest bits of each must be those of the coarse network.

    Returns:
        `(latents, codebooks)` as `init_codebooks`, in units of each group's standard deviation, `indices` kept.

    Raises:
        UserError: as `init_codebooks`; a tensor is not quantized alike in `coarse` (the message names it).
    """
    leaves = dict(named_leaves(params))
    given = dict(named_leaves(coarse, is_leaf=is_codebook_tensor))
    latents, codebooks = {}, {}
    for name, spec in decide(params, rules, any_size=True).items():
        fewest = dataclasses.replace(spec, bits=spec.all_bits[0], coarse=(), minimum_size=0)
        if not is_codebook_tensor(given.get(name)) and not decide({name: leaves[name]}, fewest):
            continue  # it did not shrink at the fewest bits, and so does not at more
        axis = group_axis(name, leaves[name].ndim, spec)
        kept = _alike(given.get(name), leaves[name].shape, axis)
        if kept is None or not spec.coarse or kept.all_bits != spec.coarse[:1]:
            raise UserError(f"{name}: the coarse network must hold it at the fewest of {spec.all_bits} bits alone")
        tensor, indices = where_sorted(leaves[name]), kept.indices()
        book = jnp.asarray(kept.codebook, jnp.float32)
        finer = split_kmeans(to_groups(tensor, axis), to_groups(indices, axis), book, spec.all_bits[1:])
        latents[name], own = _in_units(tensor, (book, *finer), None, spec, axis, True)
        codebooks[name] = dataclasses.replace(
            own, indices=indices, kept=kept.bits, dtype=str(kept.codebook.dtype), latent_dtype=_type_of(leaves[name])
        )
    return replace_named(params, latents), codebooks


def _latents_of(params: Params, codebooks: Codebooks) -> dict[str, jax.Array]:
    return {name: leaf for name, leaf in named_leaves(params) if name in codebooks}


def reassign(params: Params, codebooks: Codebooks) -> dict[str, Codebook]:
    """Stores the index of each latent's nearest centroid in the codebooks, to be used until the next call.

    Codebooks of `grow_codebooks` keep the indices that they have.

    >>> latents, books = init_codebooks({"kernel": jnp.float32([[1, 2, 3, 4]])}, {"kernel": QuantSpec(1, "tensor")})
    >>> reassign(latents, books)["kernel"].indices.tolist()
    [[0, 0, 1, 1]]
    """
    latents = _latents_of(params, codebooks)
    return {
        name: book if book.kept else dataclasses.replace(book, indices=book.assigned(latents[name]))
        for name, book in codebooks.items()
    }


def lloyd_update(
    params: Params,
    codebooks: Codebooks,
    *,
    rate: float = 0.1,
    unused_rate: float | None = None,
    many: float = 0.25,
    clip: float | None = None,
) -> dict[str, Codebook]:
    """Moves centroids towards the mean of their members: c <- (1 - rate) c + rate * mean. May be called inside jit.

    Called at every step with rate 1 on a symmetric 1-bit codebook, this is the static binary quantizer: weights are
    plus and minus the mean magnitude of the latents.

    >>> latents, books = init_codebooks({"kernel": jnp.float32([[0, 2, 10, 12]])}, QuantSpec(1, "tensor"))
    >>> latents = {"kernel": 2 * latents["kernel"]}
    >>> fake_quantize(latents, lloyd_update(latents, books, rate=1.0))["kernel"].tolist()
    [[2.0, 2.0, 22.0, 22.0]]

    Args:
        params: the tree of latents.
        codebooks: by leaf name; cached indices decide membership where there are any.
        rate: 1 is a full Lloyd iteration; KMQAT takes 0.1 once an epoch.
        unused_rate: the rate of tensors where more than the share `many` of centroids have no members (KMQAT: 0.2).
        many: see `unused_rate`.
        clip: members count at most this far from 0, in units of the scale (KMQAT: 1).

    Returns:
        The codebooks; centroids without members stay where they are, and so do those of `grow_codebooks` at the fewest
        bits.
    """
    latents = _latents_of(params, codebooks)
    moved = {}
    for name, book in codebooks.items():
        units = book.units(latents[name])
        units = units if clip is None else jnp.clip(units, -clip, clip)
        indices = book.index_of(latents[name])
        fresh = []
        for bits, centroids in zip(book.all_bits, book.constrained()):
            if bits == book.kept:
                fresh.append(centroids)
                continue
            count, total = cell_sums(units, indices >> (book.bits - bits), 1 << bits, book.axis)
            if book.symmetric:  # a cell and its mirror image are one
                count, total = count + jnp.flip(count, -1), total - jnp.flip(total, -1)
            step: Array = rate
            if unused_rate is not None:
                step = jnp.where(jnp.mean(count == 0) > many, unused_rate, rate)
            target = jnp.where(count > 0, total / jnp.maximum(count, 1), centroids)
            if book.pinned_zero:
                target = jnp.where(centroids == 0, 0.0, target)
            fresh.append(centroids + step * (target - centroids))
        moved[name] = dataclasses.replace(book, centroids=fresh[-1], coarse=tuple(fresh[:-1]))
    return moved


def pack(params: Params, codebooks: Codebooks) -> Params:
    """Turns latents and codebooks into packed tensors with exactly the values that `fake_quantize` gives.

    The scale is folded into the codebook. Leaves without a codebook are left as they are.

    >>> latents, books = init_codebooks({"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, bits=2)
    >>> pack(latents, books)["kernel"]
    CodebookTensor(shape=(4, 4), bits=2, axis=1, float32)
    """

    def packed(name: str, latent: jax.Array) -> Leaf:
        book = codebooks.get(name)
        return latent if book is None else _packed(latent, book)

    return map_named(packed, params)


@jax.jit
def _packed(latent: jax.Array, book: Codebook) -> CodebookTensor:
    indices = book.index_of(latent)
    books = tuple(book.values(bits).astype(book.dtype) for bits in book.all_bits)
    return CodebookTensor(
        codebook=books[-1],
        packed=pack_bits(to_groups(indices, book.axis), book.bits),
        coarse=books[:-1],
        shape=tuple(latent.shape),
        bits=book.bits,
        axis=book.axis,
        dtype_name=book.latent_dtype,
    )
