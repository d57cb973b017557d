"""Learning-rate schedules and the optimizer, with groups of parameters by name."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from kmq_jax.core.tree import map_named, match_rules, named_leaves
from kmq_jax.training.options import GroupOptions, OptimizerOptions, ScheduleOptions
from kmq_jax.training.state import Trainable

Schedule = Callable[[jax.Array], jax.Array]
CODEBOOKS = "network/codebooks/"
"""What names of a `Trainable` begin with where a scale or centroid is meant."""


# Own code, not optax's schedules: those warm up over whole steps (ours, over a fraction of an epoch, need not be), and
# their cosine, (pi * step) / steps, differs from pi * (step / steps) in the last digit, so runs would not repeat.
def make_schedule(options: ScheduleOptions, epoch_steps: int, total_steps: int) -> Schedule:
    """Makes the learning rate as a function of the step.

    It rises linearly from `start` to `peak`. Then "cosine" and "exponential" (WeSpeaker's) fall to `final` at the end;
    "step" stays flat to epoch `flat_until`, is divided by `factor` there, and again after every `every` epochs (as in
    the paper's public code), each time at the step nearest to it.

    >>> schedule = make_schedule(ScheduleOptions(peak=1.0, warmup_epochs=1.0), epoch_steps=10, total_steps=110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        options: the `learning_rate` section.
        epoch_steps: steps an epoch.
        total_steps: steps of the whole run, or of one phase.

    Returns:
        A function from a step, counted from 0, to a float32 scalar.
    """
    peak, start, final = options.peak, options.start, options.final
    warmup = options.warmup_epochs * epoch_steps

    def share(step: jax.Array) -> jax.Array:
        """How much of what follows the warm-up is over, 0 to 1."""
        return jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)

    def cosine(step: jax.Array) -> jax.Array:
        return final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * share(step)))

    def exponential(step: jax.Array) -> jax.Array:
        return peak * (final / peak) ** share(step)

    def drops(step: jax.Array) -> jax.Array:
        # From the middle of the step: a compiled quotient may fall short of the whole number that it is, and the drop
        # would come a step late.
        since = step + 0.5 - options.flat_until * epoch_steps
        count = jnp.floor(since / (options.every * epoch_steps)) + 1
        return peak * options.factor ** -jnp.maximum(count, 0.0)

    after_warmup = {"cosine": cosine, "exponential": exponential, "step": drops}[options.kind]

    def schedule(step: jax.Array) -> jax.Array:
        # `max`: both branches are computed, also where there is no warm-up to divide by.
        rising = start + (peak - start) * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, after_warmup(step)).astype(jnp.float32)

    return schedule


def make_optimizer(
    options: OptimizerOptions, schedule: Callable[[float | None], Schedule], params: Trainable
) -> optax.GradientTransformation:
    """Makes SGD with momentum and L2 decay, or AdamW with decoupled decay; each group by settings of its own.

    Groups without a clip of their own share the clip of the whole gradient. Scales and centroids that are in no group
    have no decay: it would pull quantized weights towards zero.

    Args:
        options: the `optimizer` section.
        schedule: learning rate by step, of a peak; None is that of the `learning_rate` section.
        params: tree whose names the groups are matched with.

    Raises:
        UserError: a group matches nothing.
    """
    names = [name for name, _ in named_leaves(params)]
    found = match_rules(options.group_rules, names)
    alone = {True: GroupOptions(decay=0.0), False: GroupOptions()}
    groups = {name: own or alone[name.startswith(CODEBOOKS)] for name, own in found.items()}
    # Factors alone need no optimizer for each group.
    if all((own.peak, own.momentum, own.clip) == (None, None, None) for own in groups.values()):
        return _shared_optimizer(options, schedule(None), groups)
    kinds = list(dict.fromkeys(groups.values()))  # groups of equal settings are one
    labels = {name: str(kinds.index(own)) for name, own in groups.items()}
    clips = {name: own.clip for name, own in groups.items()}
    clip = _where(clips, None, optax.clip_by_global_norm(options.clip)) if options.clip else optax.identity()
    optimizers = {str(i): _own_optimizer(options, own, schedule(own.peak)) for i, own in enumerate(kinds)}
    return optax.chain(clip, optax.multi_transform(optimizers, lambda tree: map_named(lambda n, _: labels[n], tree)))


def _own_optimizer(options: OptimizerOptions, own: GroupOptions, schedule: Schedule) -> optax.GradientTransformation:
    """What moves one group, after the clip that is shared."""
    parts = [optax.clip_by_global_norm(own.clip)] if own.clip else []
    decay = optax.add_decayed_weights(options.weight_decay * own.decay)
    momentum = options.momentum if own.momentum is None else own.momentum
    # SGD's decay is part of the gradient and enters the momentum; AdamW's is added after Adam's scaling.
    if options.name == "sgd":
        parts += [decay, *([optax.trace(momentum, options.nesterov)] if momentum else [])]
    else:
        parts += [optax.scale_by_adam(), decay]
    return optax.chain(*parts, optax.scale(own.rate), optax.scale_by_learning_rate(schedule))


def _shared_optimizer(
    options: OptimizerOptions, schedule: Schedule, groups: Mapping[str, GroupOptions]
) -> optax.GradientTransformation:
    """What moves groups that differ in factors alone: one state for all parameters."""
    rates = _by_group(optax.scale, {name: own.rate for name, own in groups.items()}, neutral=1.0)
    decays = {name: options.weight_decay * own.decay for name, own in groups.items()}
    decay = _by_group(optax.add_decayed_weights, decays, neutral=0.0)
    clip = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    if options.name == "sgd":
        gradient = [*decay, optax.trace(options.momentum, options.nesterov)]
    else:
        gradient = [optax.scale_by_adam(), *decay]
    return optax.chain(*clip, *gradient, *rates, optax.scale_by_learning_rate(schedule))


def _by_group(
    make: Callable[[float], optax.GradientTransformation], values: Mapping[str, float], neutral: float
) -> list[optax.GradientTransformation]:
    """A transformation `make(value)` for the parameters of each value, by name; none where it would do nothing."""
    return [_where(values, value, make(value)) for value in sorted(set(values.values()) - {neutral})]


def _where(
    values: Mapping[str, float | None], value: float | None, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The transformation, applied only to the parameters whose value (`values`, by name) is this one."""
    return optax.masked(transformation, lambda tree: map_named(lambda name, _: values[name] == value, tree))
