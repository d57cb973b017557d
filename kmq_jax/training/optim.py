"""Learning-rate schedules and the optimizer, with groups of parameters by name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, match_rules, named_leaves

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(config: ml_collections.ConfigDict, epoch_steps: int, total_steps: int) -> Schedule:
    """Makes the learning rate as a function of the step.

    Args:
        config: the `learning_rate` section: `peak`, `start` (at step 0), `warmup_epochs` (linear, start -> peak), then
            `kind`: "cosine" to `final` at the end; "exponential" to `final` at the end (WeSpeaker's); or "step": flat
            to epoch `flat_until`, then divided by `factor` there and every `every` epochs (paper's, [C]).
        epoch_steps: steps an epoch.
        total_steps: steps of the whole run.

    Raises:
        UserError: unknown `kind`, or a value that the kind cannot use.
    """
    kind, peak, start, final = config.kind, config.peak, config.start, config.final
    warmup = config.warmup_epochs * epoch_steps
    if peak <= 0:
        raise UserError(f"learning_rate.peak (={peak}) must be positive")
    if kind == "exponential" and final <= 0:
        raise UserError(f"learning_rate.final (={final}) must be positive for the exponential schedule")
    if kind == "step" and (config.factor <= 1 or config.every <= 0):
        raise UserError(
            f"learning_rate.factor (={config.factor}) must exceed 1 and every (={config.every}) must exceed 0"
        )

    def after_warmup(step: jax.Array) -> jax.Array:
        share = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        if kind == "cosine":
            return final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        if kind == "exponential":
            return peak * (final / peak) ** share
        if kind == "step":
            drops = jnp.floor((step / epoch_steps - config.flat_until) / config.every) + 1
            return peak * config.factor ** -jnp.maximum(drops, 0.0)
        raise UserError(f"learning_rate.kind {kind!r} must be one of cosine, exponential, step")

    def schedule(step: jax.Array) -> jax.Array:
        rising = start + (peak - start) * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, after_warmup(step)).astype(jnp.float32)

    after_warmup(jnp.zeros(()))  # an unknown kind is told before anything long begins
    return schedule


def make_optimizer(config: ml_collections.ConfigDict, schedule: Schedule, params: Any) -> optax.GradientTransformation:
    """Makes SGD with momentum and L2 decay, or AdamW with decoupled decay.

    Args:
        config: the `optimizer` section: `name` "sgd" or "adamw"; `momentum`, `nesterov`, or `b1`, `b2`; `weight_decay`;
            `clip` (global gradient norm, 0 for none); `groups`: `(pattern, learning-rate factor, weight-decay factor)`
            on parameter names, first match wins, 1 and 1 where none matches.
        schedule: learning rate by step.
        params: tree that the groups are matched against.

    Raises:
        UserError: unknown name, or a group that matches nothing.
    """
    factors = _group_factors(config.groups, params)
    rates = {name: factor[0] for name, factor in factors.items()}
    decays = {name: config.weight_decay * factor[1] for name, factor in factors.items()}

    def add_decay(updates: Any, params: Any) -> Any:
        return map_named(lambda name, u, p: u + decays[name] * p if decays[name] else u, updates, params)

    def scale_groups(updates: Any, params: Any) -> Any:
        del params
        return map_named(lambda name, u: u if rates[name] == 1 else u * rates[name], updates)

    decay = optax.stateless(add_decay)
    steps = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.name == "sgd":
        steps += [decay, optax.trace(decay=config.momentum, nesterov=config.nesterov)]
    elif config.name == "adamw":
        steps += [optax.scale_by_adam(b1=config.b1, b2=config.b2), decay]
    else:
        raise UserError(f"optimizer.name {config.name!r} must be one of sgd, adamw")
    return optax.chain(*steps, optax.stateless(scale_groups), optax.scale_by_learning_rate(schedule))


def _group_factors(groups: Sequence[Sequence[Any]], params: Any) -> dict[str, tuple[float, float]]:
    rules = []
    for group in groups:
        if len(group) != 3:
            raise UserError(f"optimizer.groups: {group!r} must be (pattern, rate factor, decay factor)")
        rules.append((group[0], (float(group[1]), float(group[2]))))
    return match_rules(rules, [name for name, _ in named_leaves(params)], default=(1.0, 1.0))
