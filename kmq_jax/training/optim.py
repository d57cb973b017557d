"""Learning-rate schedules and the optimizer, with groups of parameters by name."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from kmq_jax.core.tree import map_named, match_rules, named_leaves
from kmq_jax.training.options import OptimizerOptions, ScheduleOptions
from kmq_jax.training.state import Params, Trainable

Schedule = Callable[[jax.Array], jax.Array]


# Own code, not optax's schedules: those warm up over whole steps (ours, over a fraction of an epoch, need not be), and
# their cosine, (pi * step) / steps, differs from pi * (step / steps) in the last digit, so runs would not repeat.
def make_schedule(options: ScheduleOptions, epoch_steps: int, total_steps: int) -> Schedule:
    """Makes the learning rate as a function of the step.

    It rises linearly from `start` to `peak`. Then "cosine" and "exponential" (WeSpeaker's) fall to `final` at the end;
    "step" stays flat to epoch `flat_until`, is divided by `factor` there, and again after every `every` epochs (as in
    the paper's public code).

    >>> schedule = make_schedule(ScheduleOptions(peak=1.0, warmup_epochs=1.0), epoch_steps=10, total_steps=110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        options: the `learning_rate` section.
        epoch_steps: steps an epoch.
        total_steps: steps of the whole run.
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
        count = jnp.floor((step / epoch_steps - options.flat_until) / options.every) + 1
        return peak * options.factor ** -jnp.maximum(count, 0.0)

    after_warmup = {"cosine": cosine, "exponential": exponential, "step": drops}[options.kind]

    def schedule(step: jax.Array) -> jax.Array:
        rising = start + (peak - start) * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, after_warmup(step)).astype(jnp.float32)

    return schedule


def make_optimizer(options: OptimizerOptions, schedule: Schedule, params: Trainable) -> optax.GradientTransformation:
    """Makes SGD with momentum and L2 decay, or AdamW with decoupled decay.

    Args:
        options: the `optimizer` section.
        schedule: learning rate by step.
        params: tree whose names the groups are matched with.

    Raises:
        UserError: a group matches nothing.
    """
    names = [name for name, _ in named_leaves(params)]
    rules = [(pattern, (rate, decay)) for pattern, rate, decay in options.groups]
    factors = match_rules(rules, names, default=(1.0, 1.0))
    rates = _by_group(optax.scale, {name: rate for name, (rate, _) in factors.items()}, neutral=1.0)
    decays = {name: options.weight_decay * decay for name, (_, decay) in factors.items()}
    decay = _by_group(optax.add_decayed_weights, decays, neutral=0.0)
    clip = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    if options.name == "sgd":
        gradient = [*decay, optax.trace(decay=options.momentum)]
    else:
        gradient = [optax.scale_by_adam(), *decay]
    return optax.chain(*clip, *gradient, *rates, optax.scale_by_learning_rate(schedule))


def _by_group(
    make: Callable[[float], optax.GradientTransformation], values: Mapping[str, float], neutral: float
) -> list[optax.GradientTransformation]:
    """A transformation `make(value)` for the parameters of each value, by name; none where it would do nothing."""

    def of(value: float) -> Callable[[Params], Params]:
        return lambda tree: map_named(lambda name, _: values[name] == value, tree)

    return [optax.masked(make(value), of(value)) for value in sorted(set(values.values()) - {neutral})]
