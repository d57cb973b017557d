"""What a cascade saves of the bits that its last level alone would cost, by trial and by utterance."""

from kmq_jax.core.files import Row


def savings(costs: Row, top_bits: int, nested: bool) -> dict[str, float]:
    """What a cascade saves of the bits that its last level alone would cost: `trial` and `utterance`, as fractions.

    At zero or below it gains nothing: the last level alone costs no more, and the cascade decides as that does.

    Args:
        costs: those of `Outcome`.
        top_bits: bits of the last level.
        nested: whether climbing reads only the bits that are new.

    >>> costs = {"sequential_bits": 2.28, "utterance_bits": 5.44}
    >>> {name: round(share, 2) for name, share in savings(costs, 4, nested=False).items()}
    {'trial': 0.43, 'utterance': -0.36}
    """
    trial, utterance = (
        ("incremental_bits", "utterance_incremental_bits") if nested else ("sequential_bits", "utterance_bits")
    )
    return {"trial": 1 - costs[trial] / top_bits, "utterance": 1 - costs[utterance] / top_bits}


def describe_costs(costs: Row, top_bits: int, nested: bool) -> list[str]:
    r"""The costs of a cascade as lines, and plainly where it gains nothing over its last level alone.

    >>> costs = {"sequential_bits": 2.28, "utterance_bits": 5.44}
    >>> print("\n".join(describe_costs(costs, 4, nested=False)))
    bits a trial: 2.280 sequential; an utterance: 5.440
    by utterance this cascade gains nothing: its last level alone costs 4 bits
    """
    trial, utterance = f"{costs['sequential_bits']:.3f} sequential", f"{costs['utterance_bits']:.3f}"
    if nested:
        trial += f", {costs['incremental_bits']:.3f} incremental"
        utterance += f" ({costs['utterance_incremental_bits']:.3f} incremental)"
    lines = [f"bits a trial: {trial}; an utterance: {utterance}"]
    for by, share in savings(costs, top_bits, nested).items():
        if share <= 0:
            lines.append(f"by {by} this cascade gains nothing: its last level alone costs {top_bits} bits")
    return lines
