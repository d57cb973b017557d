"""A cascade from recordings beside full precision for all of them, in turns in one run: seconds and their ratio."""

import time

import numpy as np

from kmq_jax.benchmarks.options import LazyBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.cascade.run import run
from kmq_jax.cascade.verifier import load_cascade
from kmq_jax.core.files import write_json
from kmq_jax.data import source, trials
from kmq_jax.models.speaker_model import embed_all, load_model
from kmq_jax.scoring.cosine import cosine_scores


def thin(enrol: np.ndarray, test: np.ndarray, uses: int, seed: int = 0) -> np.ndarray:
    """Rows of a random part of a list in which no recording takes part in more than `uses` trials."""
    if not uses:
        return np.arange(len(enrol))
    count = np.zeros(max(enrol.max(), test.max()) + 1, int)
    kept = []
    for row in np.random.default_rng(seed).permutation(len(enrol)).tolist():
        a, b = enrol[row], test[row]
        if a != b and count[a] < uses and count[b] < uses:
            count[[a, b]] += 1
            kept.append(row)
    return np.sort(np.array(kept))


def compare(options: LazyBench) -> Figures:
    """Times both sides in turns, after one round that is not counted."""
    cascade = load_cascade(options.cascade, options.compute, options.engine)
    reference = load_model(options.reference) if options.reference else cascade.model_at(len(cascade.policy.bits) - 1)
    table = source.open_source(options.data)
    whole = trials.open_trials(options.trials, table)
    rows = thin(whole.enrol, whole.test, options.uses)
    used = np.union1d(whole.enrol[rows], whole.test[rows])
    enrol, test = (np.searchsorted(used, side[rows]).astype(np.int32) for side in (whole.enrol, whole.test))
    utterances = table.select(used)
    pairs = trials.Trials(enrol, test, whole.label[rows], whole.names, whole.enrol_name[rows], whole.test_name[rows])
    beside = load_model(options.beside) if options.beside else None
    seconds: dict[str, list[float]] = {"cascade": [], "full precision": [], "beside": []}
    for counted in [False] + [True] * options.repeats:
        start = time.perf_counter()
        lazy = cascade.score(utterances, pairs)
        outcome = run(cascade.policy, lazy.scores, enrol, test)
        middle = time.perf_counter()
        embeddings = embed_all(reference, utterances, engine=options.engine)
        full = cosine_scores(embeddings, embeddings, enrol, test)
        end = time.perf_counter()
        if beside is not None:
            embeddings = embed_all(beside, utterances, engine=options.engine)
            plain = cosine_scores(embeddings, embeddings, enrol, test)
        if counted:
            seconds["cascade"].append(middle - start)
            seconds["full precision"].append(end - middle)
            seconds["beside"].append(time.perf_counter() - end)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    right = (full >= cascade.policy.threshold) == pairs.label
    more: Figures = {}
    if beside is not None:
        more["beside"] = options.beside
        more["beside_seconds"] = median["beside"]
        more["beside_ratio"] = median["beside"] / median["full precision"]
        # Near full precision its scores are on the same scale, so that the threshold is the same.
        more["beside_harmful_flips"] = int((right & ((plain >= cascade.policy.threshold) != pairs.label)).sum())
    wrong = outcome.accept != pairs.label
    return {
        "trials": len(rows),
        "recordings": len(used),
        "embedded": {str(bits): count for bits, count in lazy.embedded.items()},
        "resolved": {str(bits): share for bits, share in outcome.resolved.items()},
        "cascade_seconds": median["cascade"],
        "full_precision_seconds": median["full precision"],
        "ratio": median["cascade"] / median["full precision"],
        "harmful_flips": int((right & wrong).sum()),
        **more,
        **cascade.costs(),
    }


def main(options: LazyBench) -> None:
    """Prints the comparison."""
    found = compare(options)
    embedded = ", ".join(f"{count:,} at {bits} bits" for bits, count in found["embedded"].items())
    print(f"{found['trials']:,} trials of {found['recordings']:,} recordings; embedded: {embedded}")
    print(
        f"cascade (below the last level {options.compute}) {found['cascade_seconds']:.1f} s, full precision for all "
        f"{found['full_precision_seconds']:.1f} s: {found['ratio']:.3f}; harmful flips: {found['harmful_flips']}"
    )
    if options.beside:
        print(
            f"{options.beside} for all {found['beside_seconds']:.1f} s: {found['beside_ratio']:.3f}; "
            f"harmful flips at the same threshold: {found['beside_harmful_flips']}"
        )
    if options.json:
        write_json(
            options.json,
            {"data": options.data, "uses": options.uses, "compute": options.compute, "engine": options.engine, **found},
        )
