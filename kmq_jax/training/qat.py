"""Quantization-aware training: what a configuration's `quant` section does to the parameters and to a training step.

While it lasts the network's quantized kernels are full-precision latents, `params["network"]`, with a codebook each,
`params["codebooks"]`. A step computes with the codebooks' values (`weights`) and moves latents, scales,
centroids and biases; `after_step` is what happens now and then instead of at every step; `packed` is the network that
is shipped.

Nested codebooks are grown from a network of the smallest width, trained before (`quant.grow_from`), which stays bit for
bit as it is: steps train wider widths in turns, inside its cells. Each width has biases of its own; the widest's are in
`params["network"]`, the others' in `params["narrow"]`.

References: KMQAT by Liu, Wang and Qian, Towards lightweight speaker verification via adaptive neural network
quantization, 2024; its settings in the study reproduced here are `quant.recipe = "kmqat"`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel
from kmq_jax.ptq import fit, moments
from kmq_jax.quant.codes import along

Codebooks = dict[str, quant.Codebook]
CENTROIDS = ("gradient", "lloyd", "fixed")
PARTS = ("codebooks", "narrow")


def is_on(section: ml_collections.ConfigDict) -> bool:
    """Whether the `quant` section asks for quantization."""
    return bool(section.bits or section.rules or section.budget)


def check(section: ml_collections.ConfigDict) -> None:
    """Checks the values that no other function checks.

    Raises:
        UserError: one cannot be used; the message names it.
    """
    if section.centroids not in CENTROIDS:
        raise UserError(f"quant.centroids (={section.centroids!r}) must be one of {', '.join(CENTROIDS)}")
    if section.centroids == "lloyd" and section.lloyd_every < 1:
        raise UserError(f"quant.lloyd_every (={section.lloyd_every}) must be at least 1 step")
    if section.reassign_every < 0:
        raise UserError(f"quant.reassign_every (={section.reassign_every}) must not be negative")
    if bool(section.coarse) != bool(section.grow_from):
        raise UserError("quant.coarse and quant.grow_from, a trained MODEL of the smallest width, go together")
    if section.grow_from and section.reassign_every:
        raise UserError("quant.reassign_every cannot be used with quant.grow_from, whose cells stay as they are")
    if section.budget and (section.bits or section.coarse or section.rules):
        raise UserError("quant.budget chooses widths itself: it cannot be used with quant.bits, coarse or rules")


def spec_of(section: ml_collections.ConfigDict, bits: int) -> quant.QuantSpec:
    """How kernels are quantized, at a width."""
    return quant.QuantSpec(
        bits,
        granularity=section.granularity,
        coarse=tuple(section.coarse),
        init=section.init,
        retention=section.retention,
        symmetric=section.symmetric,
        pinned_zero=section.pinned_zero,
    )


def rules_of(section: ml_collections.ConfigDict) -> list[quant.QuantRule]:
    """The rules that the section describes.

    Raises:
        UserError: a value cannot be used.
    """
    rules = []
    for rule in section.rules:
        if len(rule) != 2:
            raise UserError(f"quant.rules: {rule!r} must be (pattern, bits)")
        own = dataclasses.replace(spec_of(section, int(rule[1])), coarse=()) if rule[1] else None
        rules.append(quant.QuantRule(rule[0], own))
    if section.bits or section.budget:
        rules.append(quant.QuantRule(r"/kernel$", spec_of(section, section.bits or max(section.budget_bits))))
    return rules


def begin(
    section: ml_collections.ConfigDict,
    reference: SpeakerModel,
    params: Any,
    features: jax.Array | None,
    widths: Mapping[str, int] | None = None,
    narrow: Any = None,
) -> tuple[Any, Any]:
    """What training begins from: `start`, brought near to the full-precision network on some crops of speech.

    Where it can be, that is the network fitted without training (see `recalibrate`), which is worth hundreds of steps.
    KMQAT's own recipe, codebooks that channels share, and stages, whose tensors wait in full precision, are given the
    reference's moments in place of it, or begin as they are where codebooks nest.

    Args:
        section: the `quant` section.
        reference: the full-precision network.
        params: its parameters, as `start` takes them.
        features: `[batch, time, mel]`, as training gives them; None begins from k-means as it is.
        widths: see `start`.
        narrow: see `start`.

    Returns:
        `(params, batch_stats)`.

    Raises:
        UserError: as `start`.
    """
    batch_stats = reference.variables.get("batch_stats", {})
    per_channel = section.granularity == "channel" and section.recipe == "normalized"
    if features is not None and per_channel and not section.multi_stage:
        return _fitted(section, reference, params, features, widths, narrow)
    params = start(section, params, widths, narrow)
    return (params, batch_stats) if features is None or narrow is not None else repaired(reference, params, features)


def _fitted(
    section: ml_collections.ConfigDict,
    reference: SpeakerModel,
    params: Any,
    features: jax.Array,
    widths: Mapping[str, int] | None,
    narrow: Any,
) -> tuple[Any, Any]:
    rules = _rules(section, widths)
    grown = {} if narrow is None else start(section, params, widths, narrow)
    packs = (
        packed(grown, cells(grown, narrow)) if grown else {"params": quant.quantize_params(params["network"], rules)}
    )
    quantized = dataclasses.replace(reference, variables={**reference.variables, **packs})
    fitted = fit.fit(reference, quantized, features, keep_narrowest=bool(grown)).variables
    latents, books = quant.adopt_codebooks(params["network"], fitted["params"], rules)
    begun = {**params, "network": latents, "codebooks": books}
    if grown:
        own = fitted[PER_BITS]
        begun["narrow"] = {
            bits: {name: jnp.asarray(own[bits][f"params/{name}"]) for name in biases}
            for bits, biases in grown["narrow"].items()
        }
    return begun, jax.tree.map(jnp.asarray, fitted.get("batch_stats", {}))


def start(
    section: ml_collections.ConfigDict, params: Any, widths: Mapping[str, int] | None = None, narrow: Any = None
) -> Any:
    """Turns the kernels of `params["network"]` into latents, and adds their codebooks and the smaller widths' biases.

    Works on shapes too, inside `jax.eval_shape`. Without quantization `params` comes back as it is.

    Args:
        section: the `quant` section.
        params: full-precision parameters.
        widths: by name, in place of the section's rules: these tensors and no others.
        narrow: parameters of the packed network to grow from. What it does not quantize is shared by all widths.

    Raises:
        UserError: a value of the section cannot be used, a weight is not finite, or `narrow` is another network.
    """
    if not is_on(section):
        return params
    rules = _rules(section, widths)
    if narrow is not None:
        return _grown(params, narrow, rules)
    latents, books = quant.init_codebooks(params["network"], rules, recipe=section.recipe)
    return {**params, "network": latents, "codebooks": {**params.get("codebooks", {}), **books}}


def _rules(section: ml_collections.ConfigDict, widths: Mapping[str, int] | None) -> list[quant.QuantRule]:
    return quant.rules_of(widths, spec_of(section, 8)) if widths else rules_of(section)


def _grown(params: Any, narrow: Any, rules: list[quant.QuantRule]) -> Any:
    """As `start`, of nested codebooks."""
    latents, books = quant.grow_codebooks(params["network"], narrow, rules)
    quantized = {name.rpartition("/")[0] for name in books}
    own = {name: leaf for name, leaf in named_leaves(narrow, is_leaf=quant.is_codebook_tensor) if name not in books}
    network = map_named(lambda n, leaf: leaf if n.rpartition("/")[0] in quantized else jnp.asarray(own[n]), latents)
    smallest, *wider = next(iter(books.values())).all_bits[:-1]
    return {
        **params,
        "network": network,
        "codebooks": {name: dataclasses.replace(book, indices=None) for name, book in books.items()},
        "narrow": {str(smallest): _biases(narrow)} | {str(bits): _biases(network) for bits in wider},
    }


def _biases(network: Any) -> dict[str, jax.Array]:
    """Copies of what each width of nested codebooks has to itself, by name."""
    leaves = named_leaves(network, is_leaf=quant.is_codebook_tensor)
    return {name: jnp.array(leaf) for name, leaf in leaves if name.endswith("/bias")}


def cells(params: Any, narrow: Any) -> dict[str, jax.Array]:
    """The indices of the network that nested codebooks were grown from, by name: what `indices` holds all along."""
    tensors = dict(named_leaves(narrow, is_leaf=quant.is_codebook_tensor))
    return {name: quant.indices_of(tensors[name]) for name in params["codebooks"]}


def repaired(reference: SpeakerModel, params: Any, features: jax.Array) -> tuple[Any, Any]:
    """Gives the layers of what `start` made the reference's moments (see `moments`); not where codebooks nest.

    Args:
        reference: the full-precision network.
        params: from `start`, made of it.
        features: `[batch, time, mel]`, as training gives them.

    Returns:
        `(params, batch_stats)`.
    """
    books = params["codebooks"]
    batch_stats = reference.variables.get("batch_stats", {})
    variables = {"params": quant.pack(params["network"], books), "batch_stats": batch_stats}
    repair = moments.measure(reference, dataclasses.replace(reference, variables=variables), features)
    scales = {}

    def scaled(name: str, leaf: Any, slope: jax.Array) -> Any:
        book = books.get(name)
        if book is None:
            return leaf * along(slope, leaf.ndim, leaf.ndim - 1)
        if book.axis is None:
            return leaf  # one scale for all channels cannot follow; the bias still does
        slope = jnp.maximum(slope, 1e-6)
        scales[name] = book.with_scale(book.scale * slope)
        return leaf if book.normalized else leaf * along(slope, leaf.ndim, book.axis)

    variables = {"params": params["network"], "batch_stats": batch_stats}
    variables = jax.tree.map(jnp.asarray, moments.apply(repair, variables, scaled))
    return {**params, "network": variables["params"], "codebooks": {**books, **scales}}, variables["batch_stats"]


def weights(
    section: ml_collections.ConfigDict,
    params: Any,
    indices: Mapping[str, jax.Array],
    step: jax.Array,
    thaw: float,
    names: Iterable[str] | None = None,
) -> Any:
    """The network's parameters as a training step uses them: exactly what its packed form would hold.

    Args:
        section: the `quant` section.
        params: from `start`, to be differentiated.
        indices: cached ones by name; empty: each latent takes its nearest centroid afresh. See `cells`, too.
        step: of the run.
        thaw: step from which scales are trained.
        names: tensors that are quantized already; None is all of them. The others are used in full precision.
    """
    names = set(params["codebooks"]) if names is None else set(names)
    waiting = {name: book for name, book in params["codebooks"].items() if name not in names}
    latents = unquantized(params["network"], jax.lax.stop_gradient(waiting))
    books = {}
    for name, book in params["codebooks"].items():
        if name not in names:
            continue
        held = jax.lax.stop_gradient(book)
        if section.centroids == "gradient":
            held = dataclasses.replace(held, centroids=book.centroids, coarse=book.coarse)
        if section.learn_scale:
            # The same value whether frozen or not; only its gradient is switched.
            frozen = jax.lax.stop_gradient(book.raw_scale)
            held = dataclasses.replace(held, raw_scale=jnp.where(step >= thaw, book.raw_scale, frozen))
        books[name] = dataclasses.replace(held, indices=indices.get(name))
    bits = None
    if section.coarse:
        trained = jnp.array((*sorted(section.coarse)[1:], section.bits))
        bits = trained[step % len(trained)]
        latents = _own_biases(latents, params["narrow"], bits)
    clip = section.clip or None
    return quant.fake_quantize(latents, books, bits=bits, clip=clip, reduction=section.reduction)


def _own_biases(network: Any, narrow: Mapping[str, Mapping[str, jax.Array]], bits: jax.Array) -> Any:
    """The network with the biases of a width that is known only when running."""
    widths = jnp.array([int(width) for width in narrow])

    def chosen(name: str, leaf: jax.Array) -> jax.Array:
        smaller = [own[name] for own in narrow.values() if name in own]
        return jnp.stack([*smaller, leaf])[jnp.sum(widths < bits)] if smaller else leaf

    return map_named(chosen, network)


def unquantized(latents: Any, books: Mapping[str, quant.Codebook]) -> Any:
    """Latents in units of the weights, for those that have a codebook in `books`."""

    def restore(name: str, latent: jax.Array) -> jax.Array:
        book = books.get(name)
        return latent if book is None or not book.normalized else latent * along(book.scale, latent.ndim, book.axis)

    return map_named(restore, latents)


def stages_of(section: ml_collections.ConfigDict, params: Any) -> list[tuple[str, ...]]:
    """The names that are quantized in each stage of training: all in one, or the smallest widths first."""
    widths = {name: book.bits for name, book in params.get("codebooks", {}).items()}
    return [tuple(sorted(stage)) for stage in quant.phases(widths)] if section.multi_stage else [tuple(sorted(widths))]


def enter_stage(section: ml_collections.ConfigDict, params: Any, now: Iterable[str], before: Iterable[str]) -> Any:
    """Makes the codebooks afresh of the tensors that are quantized from `now` on and were not `before`."""
    fresh = {name: params["codebooks"][name] for name in sorted(set(now) - set(before))}
    full = {**params, "network": unquantized(params["network"], fresh)}
    return start(section, full, {name: book.bits for name, book in fresh.items()}) if fresh else params


def allocate(
    section: ml_collections.ConfigDict, network: Any, loss: Callable[[Any], jax.Array], key: jax.Array
) -> dict[str, int]:
    """Chooses a width for each kernel within `quant.budget`, by the traces of the loss's Hessian.

    Args:
        section: the `quant` section: `budget` is a share of the kernels' bytes in float32; `widths` to choose from;
            `sections` of like sensitivity that share a width, 0 for a width of each tensor's own; `hessian_draws`.
        network: full-precision parameters.
        loss: of such parameters, a scalar.
        key: random key.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: even the smallest widths exceed the budget.
    """
    rules = rules_of(section)
    names = list(quant.decide(network, rules))
    leaves = dict(named_leaves(network))
    budget = section.budget * sum(4 * leaves[name].size for name in names)
    errors, sizes = quant.distortions(network, rules, tuple(section.budget_bits))
    traces = quant.hessian_traces(loss, network, key, draws=section.hessian_draws, names=names)
    if section.sections:
        return quant.allocate_sections(traces, errors, sizes, budget, section.sections)
    return quant.allocate(traces, errors, sizes, budget)


def after_step(
    section: ml_collections.ConfigDict,
    params: Any,
    indices: Mapping[str, jax.Array],
    step: jax.Array,
    lloyd_until: float,
) -> tuple[Any, Mapping[str, jax.Array]]:
    """Lloyd updates of the centroids and new assignments, when they are due.

    Args:
        section: the `quant` section.
        params: after the optimizer's step.
        indices: cached ones.
        step: steps done.
        lloyd_until: no Lloyd updates after this step, so that the end of training is quiet.
    """
    latents, books = params["network"], params["codebooks"]

    if section.centroids == "lloyd":

        def lloyd(books: Codebooks) -> Codebooks:
            held = {n: dataclasses.replace(b, indices=indices.get(n)) for n, b in books.items()}
            moved = quant.lloyd_update(
                latents, held, rate=section.lloyd_rate, unused_rate=section.lloyd_unused_rate or None
            )
            return {n: dataclasses.replace(b, indices=None) for n, b in moved.items()}

        due = (step % section.lloyd_every == 0) & (step <= lloyd_until)
        books = jax.lax.cond(due, lloyd, lambda same: same, books)
    if section.reassign_every:
        due = step % section.reassign_every == 0
        indices = jax.lax.cond(due, lambda _: assigned(latents, books), lambda same: dict(same), indices)
    return {**params, "codebooks": books}, indices


def kept(before: Any, after: Any) -> Any:
    """The parameters after a step, with all that the network grown from has a share in as it was before."""
    books = {}
    for name, book in after["codebooks"].items():
        old = before["codebooks"][name]
        books[name] = dataclasses.replace(book, raw_scale=old.raw_scale, coarse=(old.coarse[0], *book.coarse[1:]))
    shared = {n: leaf for n, leaf in named_leaves(before["network"]) if n not in books and not n.endswith("/bias")}
    network = map_named(lambda name, leaf: shared.get(name, leaf), after["network"])
    smallest = min(before["narrow"], key=int)
    narrow = {**after["narrow"], smallest: before["narrow"][smallest]}
    return {**after, "network": network, "codebooks": books, "narrow": narrow}


def assigned(latents: Any, books: Mapping[str, quant.Codebook]) -> dict[str, jax.Array]:
    """The index of every latent's nearest centroid, by name."""
    kept = quant.reassign(latents, books)
    return {name: book.indices for name, book in kept.items() if book.indices is not None}


def packed(params: Any, indices: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The variables that are shipped: packed tensors in place of latents, and the smaller widths' biases."""
    books = {n: dataclasses.replace(b, indices=indices.get(n)) for n, b in params["codebooks"].items()}
    narrow = {bits: {f"params/{n}": leaf for n, leaf in own.items()} for bits, own in params.get("narrow", {}).items()}
    return {"params": quant.pack(params["network"], books), **({PER_BITS: narrow} if narrow else {})}
