"""Quantization-aware training: from full-precision parameters to latents with codebooks, and back to packed tensors.

A step computes with the codebooks' values (`effective_weights`), and its gradients move latents, scales, centroids and
biases. `move_centroids` and `reassign` act every so many steps. `packed_variables` gives the network that is shipped.

Nested codebooks grow from a network of the fewest bits that was trained before (`quant.grow_from`, here `parent`). It
stays bit for bit as it is. Steps train the other numbers of bits in turn, inside its cells.

Reference: KMQAT is by Liu, Wang and Qian, Towards lightweight speaker verification via adaptive neural network
quantization, 2024.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp

from kmq_jax import quant
from kmq_jax.core.tree import Params, Variables, map_named, named_leaves, replace_named
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel
from kmq_jax.nn import integers
from kmq_jax.ptq import activations, fit, moments
from kmq_jax.ptq.quantize import with_half_biases
from kmq_jax.quant.codes import along
from kmq_jax.training.options import HALF, QatOptions
from kmq_jax.training.state import QatParams

Codebooks = Mapping[str, quant.Codebook]
Indices = Mapping[str, jax.Array]
Allocation = Mapping[str, int]
"""Bits by name of a tensor, in mixed precision."""


def spec_of(options: QatOptions, bits: int) -> quant.QuantSpec:
    """How a kernel is quantized to so many bits.

    Small kernels are quantized, too, whose codebooks take more room than their indices save: the paper quantizes all,
    and what is trained at few bits may grow nested codebooks of more. So a trained file may exceed what
    `quant.quantize_params` makes, which leaves such kernels as they are.
    """
    return quant.QuantSpec(
        bits,
        granularity=options.granularity,
        coarse=options.coarse,
        init=options.init,
        retention=options.retention,
        symmetric=options.symmetric,
        levels=options.levels,
        only_smaller=False,
    )


def rules_of(options: QatOptions, allocation: Allocation | None = None) -> list[quant.QuantRule]:
    """The rules that say which tensors are quantized and how.

    >>> [rule.pattern for rule in rules_of(QatOptions(bits=2, rules=(("^stem/", 0),)))]
    ['^stem/', '/kernel$']

    Args:
        options: the `quant` section.
        allocation: these tensors and no others, in place of the section's rules.

    Raises:
        UserError: a value cannot be used.
    """
    if allocation:
        return quant.rules_of(allocation, spec_of(options, 8))
    rules = []
    for pattern, bits in options.rules:
        spec = dataclasses.replace(spec_of(options, bits), coarse=()) if bits else None
        rules.append(quant.QuantRule(pattern, spec))
    if options.bits or options.mixed:
        rules.append(quant.QuantRule(r"/kernel$", spec_of(options, options.bits or max(options.budget_bits))))
    return rules


def init_params(
    options: QatOptions, network: Params, allocation: Allocation | None = None, parent: Params | None = None
) -> QatParams:
    """Makes latents and codebooks of full-precision parameters, by k-means. Works on shapes in `jax.eval_shape`.

    >>> network = {"conv": {"kernel": jnp.linspace(-1.0, 1.0, 128).reshape(64, 2), "bias": jnp.zeros(2)}}
    >>> init_params(QatOptions(bits=2), network).codebooks
    {'conv/kernel': Codebook(groups=2, bits=2, axis=1, float16)}

    Args:
        options: the `quant` section.
        network: full-precision parameters.
        allocation: see `rules_of`.
        parent: parameters of the packed network to grow from. What it does not quantize, all bits share.

    Raises:
        UserError: a value of the section cannot be used, a weight is not finite, or `parent` is another network.
    """
    rules = rules_of(options, allocation)
    if parent is not None:
        return _grow(network, parent, rules)
    return QatParams(*quant.init_codebooks(network, rules, recipe=options.recipe))


def _grow(network: Params, parent: Params, rules: list[quant.QuantRule]) -> QatParams:
    """As `init_params`, of nested codebooks that grow from `parent`."""
    latents, books = quant.grow_codebooks(network, parent, rules)
    quantized_layers = {name.rpartition("/")[0] for name in books}
    shared = {name: leaf for name, leaf in named_leaves(parent, quant.is_codebook_tensor) if name not in books}

    # A quantized layer is the parent's at the fewest bits and fitted anew at more; what is not quantized, all share.
    def take(name: str, latent: jax.Array) -> jax.Array:
        return latent if name.rpartition("/")[0] in quantized_layers else jnp.asarray(shared[name])

    latents = map_named(take, latents)
    # All of these books have the same bits. The biases of the most bits are in `latents`.
    fewest, *more = next(iter(books.values())).all_bits[:-1]
    return QatParams(
        latents,
        {name: dataclasses.replace(book, indices=None) for name, book in books.items()},
        {str(fewest): _biases(parent)} | {str(bits): _biases(latents) for bits in more},
    )


def _biases(network: Params) -> Params:
    """Copies of a network's biases: each number of bits of nested codebooks has its own."""
    found: dict[str, Params] = {}
    for key, value in network.items():
        if isinstance(value, Mapping):
            below = _biases(value)
            found |= {key: below} if below else {}
        elif key == "bias":
            found[key] = jnp.array(value)
    return found


def parent_indices(params: QatParams, parent: Params) -> dict[str, jax.Array]:
    """The indices of the network that nested codebooks grow from, by name: `TrainState.indices` of the whole run."""
    tensors = dict(named_leaves(parent, is_leaf=quant.is_codebook_tensor))
    return {name: quant.indices_of(tensors[name]) for name in params.codebooks}


def init_fitted(
    options: QatOptions,
    reference: SpeakerModel,
    features: jax.Array | None,
    allocation: Allocation | None = None,
    parent: Params | None = None,
    ranges: activations.Ranges | None = None,
) -> tuple[QatParams, Params]:
    """As `init_params`, then brings the network near to the full-precision one on some crops of speech.

    Where possible, training begins with the network that `ptq.fit` gives without training, by statistics of batches:
    that saves hundreds of steps. It is not possible where the recipe is "weights", where channels share a codebook, and
    where phases leave tensors in full precision. There each layer is only given the reference's moments
    (`match_moments`), and nested codebooks stay as k-means makes them.

    Args:
        options: the `quant` section.
        reference: the full-precision network.
        features: `[batch, time, mel]`, such as `Speech.crops` gives; None leaves the network as k-means makes it.
        allocation: see `rules_of`.
        parent: see `init_params`.
        ranges: of activations that are rounded to 8 bits; None rounds none.

    Returns:
        Parameters and running statistics.

    Raises:
        UserError: as `init_params`.
    """
    network, batch_stats = reference.variables["params"], reference.variables.get("batch_stats", {})
    can_fit = options.granularity == "channel" and options.recipe == "normalized" and not options.multi_stage
    if features is not None and can_fit:
        return _fit(options, reference, features, allocation, parent, ranges)
    params = init_params(options, network, allocation, parent)
    if features is None or parent is not None:
        return params, batch_stats
    # Later phases make codebooks of their own: until then their tensors are used in full precision.
    return match_moments(reference, params, features, phases_of(options, params.codebooks)[0])


def _fit(
    options: QatOptions,
    reference: SpeakerModel,
    features: jax.Array,
    allocation: Allocation | None,
    parent: Params | None,
    ranges: activations.Ranges | None,
) -> tuple[QatParams, Params]:
    network, rules = reference.variables["params"], rules_of(options, allocation)
    if parent is None:
        packed = {"params": quant.quantize_params(network, rules)}
    else:
        grown = init_params(options, network, allocation, parent)
        packed = packed_variables(grown, parent_indices(grown, parent))
    quantized = dataclasses.replace(reference, variables={**reference.variables, **packed})
    quantized = activations.with_ranges(quantized, ranges) if ranges else quantized
    levels = fit.patterned(network, rules)
    kept = parent is not None
    fitted = fit.fit(reference, quantized, features, kept, levels, batch_statistics=True).variables
    own = fitted.get(PER_BITS, {}) if parent is not None else {}
    per_bits = {bits: _biases_of(grown.per_bits[bits], leaves) for bits, leaves in own.items()}
    params = QatParams(*quant.adopt_codebooks(network, fitted["params"], rules), per_bits)
    return params, jax.tree.map(jnp.asarray, fitted.get("batch_stats", {}))


def _biases_of(biases: Params, leaves: Mapping[str, jax.Array]) -> Params:
    """The tree of `biases` with the values that variables of those names have."""
    return map_named(lambda name, _: jnp.asarray(leaves[f"params/{name}"]), biases)


def match_moments(
    reference: SpeakerModel, params: QatParams, features: jax.Array, names: Collection[str] | None = None
) -> tuple[QatParams, Params]:
    """Gives each layer's outputs the mean and deviation they have in the reference (`ptq.moments`).

    Where all channels share a codebook they get the mean alone. Not for nested codebooks.

    Args:
        reference: the full-precision network.
        params: made of it by `init_params`.
        features: `[batch, time, mel]`, such as `Speech.crops` gives.
        names: tensors that are quantized already, as in `effective_weights`.

    Returns:
        Parameters and running statistics.
    """
    batch_stats = reference.variables.get("batch_stats", {})
    used = {name: book for name, book in params.codebooks.items() if names is None or name in names}
    waiting = {name: book for name, book in params.codebooks.items() if name not in used}
    quantized = {
        "params": quant.pack(weights_of_latents(params.latents, waiting), used),
        "batch_stats": batch_stats,
    }
    repair = moments.measure(reference, dataclasses.replace(reference, variables=quantized), features)
    scaled_books = {}

    def scaled(name: str, leaf: jax.Array, slope: jax.Array) -> jax.Array:
        book = used.get(name)
        if book is None:  # in full precision, whatever the unit of the latent
            return leaf * along(slope, leaf.ndim, leaf.ndim - 1)
        if book.axis is None:
            return leaf  # slopes are 1: one scale for all channels cannot take a slope for each
        # A channel that the reference leaves constant has slope 0, but a scale must stay positive.
        slope = jnp.maximum(slope, 1e-6)
        scaled_books[name] = book.with_scale(book.scale * slope)
        # A latent in units of the scale grows with it; one in units of the weights does not.
        return leaf if book.normalized else leaf * along(slope, leaf.ndim, book.axis)

    variables = moments.apply(repair, {"params": params.latents, "batch_stats": batch_stats}, scaled)
    variables = jax.tree.map(jnp.asarray, variables)
    matched = QatParams(variables["params"], {**params.codebooks, **scaled_books}, params.per_bits)
    return matched, variables["batch_stats"]


def effective_weights(
    options: QatOptions,
    params: QatParams,
    indices: Indices,
    step: jax.Array,
    thaw: float = 0.0,
    names: Collection[str] | None = None,
) -> Params:
    """The weights that a training step computes with: exactly what the packed network would hold.

    Args:
        options: the `quant` section.
        params: to be differentiated.
        indices: see `TrainState`.
        step: of the phase.
        thaw: step of a phase from which scales are trained.
        names: tensors that are quantized already; None is all. The others are used in full precision.

    Returns:
        The tree of `params.latents`, differentiable in `params`.
    """
    names = set(params.codebooks) if names is None else set(names)
    # Tensors of a later phase are used in full precision: their codebook only tells the unit of their latents.
    waiting = {name: book for name, book in params.codebooks.items() if name not in names}
    latents = weights_of_latents(params.latents, jax.lax.stop_gradient(waiting))
    books = {
        name: dataclasses.replace(_trained_parts(options, book, step >= thaw), indices=indices.get(name))
        for name, book in params.codebooks.items()
        if name in names
    }
    if not options.coarse:
        return quant.fake_quantize(latents, books)
    # One program serves all bits: which are trained in this step is known only when it runs.
    bits = jnp.array(options.trained_bits)[step % len(options.trained_bits)]
    return quant.fake_quantize(_with_biases(latents, params.per_bits, bits), books, bits=bits)


def integer_steps(
    ranges: activations.Ranges | None, params: QatParams, names: Collection[str] | None = None
) -> Variables:
    """The variables beside weights and statistics where activations are rounded: the collection of `nn.integers`.

    Args:
        ranges: of the activations; None: nothing.
        params: whose codebooks give the steps of kernels.
        names: as in `effective_weights`.
    """
    if not ranges:
        return {}
    used = set(params.codebooks) if names is None else set(names)
    # By name: output channels, and the values that a quantized kernel can take; None where it is in full precision.
    kernels = {
        name: (
            latent.shape[-1],
            jax.lax.stop_gradient(params.codebooks[name]).values() if name in used & set(params.codebooks) else None,
        )
        for name, latent in named_leaves(params.latents)
        if latent.ndim
    }
    return {integers.COLLECTION: activations.rounding_steps(ranges, kernels)}


def _trained_parts(options: QatOptions, book: quant.Codebook, thawed: jax.Array) -> quant.Codebook:
    """A codebook with gradients only of what is trained."""
    held = jax.lax.stop_gradient(book)
    if options.centroids == "gradient":
        held = dataclasses.replace(held, centroids=book.centroids, coarse=book.coarse)
    # The same value whether frozen or not; only its gradient is switched.
    return dataclasses.replace(held, raw_scale=jnp.where(thawed, book.raw_scale, held.raw_scale))


def _with_biases(network: Params, per_bits: Mapping[str, Params], bits: jax.Array) -> Params:
    """The network with the biases of so many bits; `bits` is traced, so all are stacked and one is selected."""
    smaller = jnp.array([int(own) for own in per_bits])
    biases = [dict(named_leaves(own)) for own in per_bits.values()]

    def choose(name: str, leaf: jax.Array) -> jax.Array:
        own = [tree[name] for tree in biases if name in tree]
        # `own` ascends by bits and `leaf` belongs to the most, so the count of smaller ones is the place.
        return jnp.stack([*own, leaf])[jnp.sum(smaller < bits)] if own else leaf

    return map_named(choose, network)


def weights_of_latents(latents: Params, codebooks: Codebooks) -> Params:
    """The full-precision weights of latents: one in units of its codebook's scale is multiplied by that scale."""

    def weights(name: str, latent: jax.Array) -> jax.Array:
        book = codebooks.get(name)
        return latent if book is None or not book.normalized else latent * along(book.scale, latent.ndim, book.axis)

    return map_named(weights, latents)


def phases_of(options: QatOptions, codebooks: Codebooks) -> list[tuple[str, ...]]:
    """The names that are quantized in each phase: all in one, or the fewest bits first (multi-stage fine-tuning).

    A later phase also holds the names of those before it.
    """
    bits = {name: book.bits for name, book in codebooks.items()}
    return [tuple(sorted(phase)) for phase in quant.phases(bits)] if options.multi_stage else [tuple(sorted(bits))]


def enter_phase(
    options: QatOptions, params: QatParams, indices: Indices, names: Collection[str], before: Collection[str]
) -> tuple[QatParams, Indices]:
    """Makes new codebooks of the tensors that are quantized from now on: those of `names` that are not in `before`.

    Until now they were trained in full precision, and their codebooks only told the unit of their latents.

    Args:
        options: the `quant` section.
        params: at the end of the phase before.
        indices: see `TrainState`.
        names: the tensors of the phase that begins.
        before: the tensors of the phase before.

    Returns:
        Parameters and indices.
    """
    fresh = {name: params.codebooks[name] for name in sorted(set(names) - set(before))}
    if not fresh:
        return params, indices
    weights = weights_of_latents(params.latents, fresh)
    made = init_params(options, weights, {name: book.bits for name, book in fresh.items()})
    return QatParams(made.latents, {**params.codebooks, **made.codebooks}, params.per_bits), {
        **indices,
        **first_indices(options, made),
    }


def first_indices(options: QatOptions, params: QatParams) -> Indices:
    """The cached indices that training begins with, by name; none where each step assigns afresh."""
    if not options.cached:
        return {}
    if options.recipe != "weights" or options.symmetric:
        # Compiled, as in a step: else a latent on a border may get another index.
        return jax.jit(nearest_indices)(params)
    latents = dict(named_leaves(params.latents))
    return {n: quant.kmqat_indices(latents[n], book, options.retention) for n, book in params.codebooks.items()}


def allocate(
    options: QatOptions, network: Params, loss: Callable[[Params], jax.Array], key: jax.Array
) -> dict[str, int]:
    """Chooses the bits of each kernel within `quant.budget` or `quant.average_bits`.

    Kernels to whose errors the loss is more sensitive, by the trace of its Hessian, get more bits.

    Args:
        options: the `quant` section.
        network: full-precision parameters.
        loss: of such parameters, a scalar.
        key: random key.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: even the fewest bits exceed the budget.
    """
    rules = rules_of(options)
    names = list(quant.decide(network, rules))
    leaves = dict(named_leaves(network))
    # In bytes: a float32 weight takes four.
    budget = options.budget * sum(4 * leaves[name].size for name in names)
    errors, sizes = quant.distortions(network, rules, options.budget_bits)
    if options.average_bits:  # bytes of indices alone, without codebooks
        budget = options.average_bits / 8 * sum(leaves[name].size for name in names)
        sizes = {name: {bits: bits / 8 * leaves[name].size for bits in options.budget_bits} for name in names}
    traces = quant.hessian_traces(loss, network, key, draws=options.hessian_draws, names=names)
    if options.sections:
        return quant.allocate_sections(traces, errors, sizes, budget, options.sections)
    return quant.allocate(traces, errors, sizes, budget)


def move_centroids(
    options: QatOptions, params: QatParams, indices: Indices, step: jax.Array, last_step: float
) -> QatParams:
    """Moves centroids towards the mean of their members, as Lloyd's algorithm does, where it is due.

    Args:
        options: the `quant` section.
        params: after the optimizer's step.
        indices: see `TrainState`.
        step: steps done.
        last_step: centroids rest after it, so that the end of training is quiet.

    Returns:
        The parameters; the same ones where nothing is due.
    """
    if options.centroids != "lloyd":
        return params

    def move(books: Codebooks) -> Codebooks:
        held = {name: dataclasses.replace(book, indices=indices.get(name)) for name, book in books.items()}
        moved = quant.lloyd_update(
            params.latents,
            held,
            rate=options.lloyd_rate,
            unused_rate=options.lloyd_unused_rate or None,
            clip=options.lloyd_clip or None,
        )
        return {name: dataclasses.replace(book, indices=None) for name, book in moved.items()}

    # A branch inside the compiled step: whether it is due is known only when it runs, and most steps skip the work.
    due = (step % options.lloyd_every == 0) & (step <= last_step)
    return dataclasses.replace(params, codebooks=jax.lax.cond(due, move, lambda same: same, params.codebooks))


def reassign(options: QatOptions, params: QatParams, indices: Indices, step: jax.Array) -> Indices:
    """Assigns latents to centroids anew, where it is due.

    Args:
        options: the `quant` section.
        params: after `move_centroids`.
        indices: cached ones, by name.
        step: steps done.
    """
    if not options.reassign_every:
        return indices
    due = step % options.reassign_every == 0
    # `dict`: both branches must give the same kind of tree.
    return jax.lax.cond(due, lambda _: nearest_indices(params), lambda same: dict(same), indices)


def nearest_indices(params: QatParams) -> dict[str, jax.Array]:
    """The index of every latent's nearest centroid, by name."""
    books = quant.reassign(params.latents, params.codebooks)
    return {name: book.indices for name, book in books.items() if book.indices is not None}


def hold_still(options: QatOptions, before: QatParams, after: QatParams, frozen: jax.Array | bool) -> QatParams:
    """The parameters `after` an optimizer's step, with those that it must not move taken from `before`.

    These are centroids that no gradient trains, and scales that are not trained yet: decay and momentum would move
    them.

    Args:
        options: the `quant` section.
        before: parameters before the step.
        after: those that the optimizer gives.
        frozen: whether scales do not train yet.
    """

    def held(old: quant.Codebook, book: quant.Codebook) -> quant.Codebook:
        if options.centroids != "gradient":
            book = dataclasses.replace(book, centroids=old.centroids, coarse=old.coarse)
        return dataclasses.replace(book, raw_scale=jnp.where(frozen, old.raw_scale, book.raw_scale))

    books = {name: held(before.codebooks[name], book) for name, book in after.codebooks.items()}
    return dataclasses.replace(after, codebooks=books)


def keep_parent(before: QatParams, after: QatParams) -> QatParams:
    """The parameters `after` a step, with those of the network of the fewest bits taken from `before`.

    These are the scales, that network's own centroids and biases, and whatever is in full precision.
    """
    books = {}
    # The optimizer moves everything at once; undoing costs less than a mask in each of its states.
    for name, book in after.codebooks.items():
        old = before.codebooks[name]
        # `coarse` ascends by bits: its first are the parent's.
        books[name] = dataclasses.replace(book, raw_scale=old.raw_scale, coarse=(old.coarse[0], *book.coarse[1:]))
    shared = {n: leaf for n, leaf in named_leaves(before.latents) if n not in books and not n.endswith("/bias")}
    fewest = min(before.per_bits, key=int)
    return QatParams(
        replace_named(after.latents, shared),
        books,
        {**after.per_bits, fewest: before.per_bits[fewest]},
    )


def half_rules(options: QatOptions) -> list[quant.QuantRule]:
    """The section's rules, of which only those that store tensors in float16 act; the others leave what they match.

    Empty where no rule stores any.

    >>> rules = half_rules(QatOptions(bits=2, rules=(("^stem/", 16),)))
    >>> [(rule.pattern, rule.spec and rule.spec.bits) for rule in rules]
    [('^stem/', 16), ('/kernel$', None)]
    """
    rules = [
        quant.QuantRule(rule.pattern, rule.spec if rule.spec and rule.spec.bits == HALF else None)
        for rule in rules_of(options)
    ]
    return rules if any(rule.spec for rule in rules) else []


def packed_variables(
    params: QatParams, indices: Indices, half_biases: bool = False, half: Sequence[quant.QuantRule] = ()
) -> Variables:
    """The variables that are shipped: packed tensors in place of latents, and the biases of fewer bits.

    Args:
        params: of a state.
        indices: see `TrainState`.
        half_biases: store the biases of convolutions and linear layers in float16.
        half: rules by which other tensors are stored in float16, from `half_rules`. Steps compute with them in float32.
    """
    books = {name: dataclasses.replace(book, indices=indices.get(name)) for name, book in params.codebooks.items()}
    per_bits = {
        bits: {f"params/{name}": leaf for name, leaf in named_leaves(biases)}
        for bits, biases in params.per_bits.items()
    }
    packed = quant.pack(params.latents, books)
    packed = quant.quantize_params(packed, half) if half else packed
    variables = {"params": packed, **({PER_BITS: per_bits} if per_bits else {})}
    return with_half_biases(variables) if half_biases else variables
