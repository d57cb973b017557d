"""What a cascade saves against its last level alone, by trial and by utterance: in bits, or in seconds."""

from collections.abc import Sequence

from kmq_jax.core.files import Row


def savings(costs: Row, top_bits: int, nested: bool, seconds: Sequence[float] | None = None) -> dict[str, float]:
    """What a cascade saves against its last level alone, as fractions of that level's cost.

    At zero or below a cascade gains nothing: the last level alone costs no more, and its decisions are those that the
    cascade aims at.

    Args:
        costs: the costs of `cascade.run.Outcome`, by name.
        top_bits: bits of the last level.
        nested: whether climbing reads only the bits that are new.
        seconds: what a recording takes at each level. Where they are known, seconds count in place of bits.

    Returns:
        `trial` and `utterance`: the share saved of the mean cost of each.

    >>> costs = {"sequential_bits": 2.28, "utterance_bits": 5.44, "sequential_seconds": 0.5, "utterance_seconds": 1.5}
    >>> {name: round(share, 2) for name, share in savings(costs, 4, nested=False).items()}
    {'trial': 0.43, 'utterance': -0.36}
    >>> savings(costs, 4, nested=False, seconds=(0.25, 2.0))
    {'trial': 0.75, 'utterance': 0.25}
    """
    if seconds:
        return {by: 1 - costs[f"{kind}_seconds"] / seconds[-1] for by, kind in _KINDS.items()}
    trial, utterance = (
        ("incremental_bits", "utterance_incremental_bits") if nested else ("sequential_bits", "utterance_bits")
    )
    return {"trial": 1 - costs[trial] / top_bits, "utterance": 1 - costs[utterance] / top_bits}


_KINDS = {"trial": "sequential", "utterance": "utterance"}


def describe_costs(costs: Row, top_bits: int, nested: bool, seconds: Sequence[float] | None = None) -> list[str]:
    r"""The costs of a cascade as lines, with a line wherever it gains nothing over its last level alone.

    Arguments are those of `savings`.

    >>> costs = {"sequential_bits": 2.28, "utterance_bits": 5.44}
    >>> print("\n".join(describe_costs(costs, 4, nested=False)))
    bits a trial: 2.280 sequential; an utterance: 5.440
    by utterance this cascade gains nothing: its last level alone costs 4 bits
    """
    trial, utterance = f"{costs['sequential_bits']:.3f} sequential", f"{costs['utterance_bits']:.3f}"
    if nested:
        trial += f", {costs['incremental_bits']:.3f} incremental"
        utterance += f" ({costs['utterance_incremental_bits']:.3f} incremental)"
    lines, alone = [f"bits a trial: {trial}; an utterance: {utterance}"], f"{top_bits} bits"
    if seconds:
        by_trial, by_utterance, alone = (
            f"{1e3 * value:.1f} ms" for value in (*(costs[f"{kind}_seconds"] for kind in _KINDS.values()), seconds[-1])
        )
        lines.append(f"a tested recording: {by_trial} by trial, {by_utterance} by utterance; at the last level {alone}")
    for by, share in savings(costs, top_bits, nested, seconds).items():
        if share <= 0:
            lines.append(f"by {by} this cascade gains nothing: its last level alone costs {alone}")
    return lines
