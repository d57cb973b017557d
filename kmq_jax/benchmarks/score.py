"""Scoring and evaluating a long trial list beside plain numpy and scikit-learn's `roc_curve`: time, memory, figures."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kmq_jax.benchmarks.options import ScoreBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.core.files import write_json
from kmq_jax.core.memory import peak_memory_mb
from kmq_jax.data.trials import Trials, read_trials
from kmq_jax.metrics.evaluate import evaluate
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.scoring.run import write_scores

_PEER_REPLICATES = 3  # of the bootstrap by `roc_curve`: its time is scaled up


def make(trials: int, utterances: int, speakers: int, dim: int, spread: float) -> tuple[np.ndarray, np.ndarray, Trials]:
    """Random embeddings `[utterances, dim]` about random speakers, the speakers `[utterances]`, and trials."""
    rng = np.random.default_rng(0)
    speaker = np.arange(utterances) % speakers
    centres = rng.standard_normal((speakers, dim), np.float32)
    embeddings = centres[speaker] + spread * rng.standard_normal((utterances, dim), np.float32)
    enrol = rng.integers(utterances, size=trials)
    other = rng.integers(utterances, size=trials)
    # Utterance u is of speaker u % speakers. Wrapped at the last whole round of speakers, `same` keeps the speaker.
    same = (other - other % speakers + speaker[enrol]) % (utterances - utterances % speakers)
    test = np.where(np.arange(trials) % 2 == 0, same, other)
    names = tuple(f"id{10000 + s}/video{u % 97:04d}/{u:06d}.wav" for u, s in enumerate(speaker.tolist()))
    enrol, test = enrol.astype(np.int32), test.astype(np.int32)
    return embeddings, speaker, Trials(enrol, test, speaker[enrol] == speaker[test], names, enrol, test)


def peer_score(embeddings: np.ndarray, trials: Trials) -> np.ndarray:
    """Cosine scores the plain way."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.sum(unit[trials.enrol] * unit[trials.test], axis=1)


def peer_metrics(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """EER (fraction) and minDCF(0.01) by `roc_curve`, an interpolation and a root finder, as toolkits do it."""
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights)
    rate = float(brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1, xtol=1e-9))
    return rate, float(np.min(0.01 * (1 - tpr) + 0.99 * fpr) / 0.01)


def peer_bootstrap(scores: np.ndarray, labels: np.ndarray, enrol: np.ndarray, test: np.ndarray) -> None:
    """A few replicates of the same bootstrap: weights, and the whole evaluation again."""
    speakers = int(max(enrol.max(), test.max())) + 1
    rng = np.random.default_rng(0)
    for draw in rng.multinomial(speakers, np.full(speakers, 1 / speakers), _PEER_REPLICATES):
        # A trial counts once for each pair of its drawn speakers; within a speaker, once for each draw.
        peer_metrics(scores, labels, np.where(enrol == test, draw[enrol], draw[enrol] * draw[test]))


def timed(options: ScoreBench) -> tuple[dict[str, float], dict[str, float], Figures]:
    """Median seconds of each task, memory in MB before and after either side, and what the tasks gave."""
    embeddings, speaker, trials = make(
        options.trials, options.utterances, options.speakers, options.dim, options.spread
    )
    enrol, test = speaker[trials.enrol], speaker[trials.test]
    memory = {"before": peak_memory_mb()}
    kept: Figures = {}  # what a task gave, for the tasks after it

    def keep(name: str, task: Callable[[], object]) -> Callable[[], None]:
        return lambda: kept.update({name: task()})

    def after(name: str) -> None:
        if name == "write":  # before the peer's first turn
            memory.setdefault("ours", peak_memory_mb())

    with tempfile.TemporaryDirectory() as directory:
        listing, out = Path(directory, "trials.txt"), Path(directory, "scores.txt")
        lines = zip(trials.label.tolist(), trials.enrol.tolist(), trials.test.tolist())
        listing.write_text("".join(f"{int(y)} {trials.names[e]} {trials.names[t]}\n" for y, e, t in lines))
        tasks: dict[str, Callable[[], None]] = {
            "score": keep("scores", lambda: cosine_scores(embeddings, embeddings, trials.enrol, trials.test)),
            "evaluate": keep(
                "result", lambda: evaluate(kept["scores"], trials.label, enrol, test, replicates=options.replicates)
            ),
            "read": keep("listed", lambda: read_trials(listing, trials.names)),
            "write": lambda: write_scores(str(out), trials, kept["scores"]),
            "peer_score": keep("peer_scores", lambda: peer_score(embeddings, trials)),
            "peer_evaluate": keep("peer", lambda: peer_metrics(kept["peer_scores"], trials.label)),
            "peer_bootstrap": lambda: peer_bootstrap(kept["peer_scores"], trials.label, enrol, test),
        }
        seconds = medians(in_turns(tasks, options.repeats, warm_up=0, between=after))
    seconds["peer_bootstrap"] *= options.replicates / _PEER_REPLICATES
    return seconds, memory | {"peer": peak_memory_mb()}, kept


def main(options: ScoreBench) -> None:
    """Prints the comparison."""
    seconds, memory, kept = timed(options)
    result, (rate, cost) = kept["result"], kept["peer"]
    total, peer_total = (seconds[f"{side}score"] + seconds[f"{side}evaluate"] for side in ("", "peer_"))
    figures = {
        "trials": options.trials,
        "dim": options.dim,
        "seconds": seconds,
        "score_and_evaluate_seconds": total,
        "peer_without_intervals_seconds": peer_total,
        "peer_with_intervals_seconds": peer_total + seconds["peer_bootstrap"],
        "memory_mb": memory,
        "eer": result["eer"],
        "eer_ci95": result["eer_ci95"],
        "eer_difference": abs(result["eer"] / 100 - rate),
        "min_dcf_difference": abs(result["min_dcf"] - cost),
    }
    print(f"{options.trials:,} trials x {options.dim}, EER {result['eer']:.3f} % {result['eer_ci95']}")
    print(f"                                     {'ours':>9} {'numpy + scikit-learn':>22}")
    print(f"cosine scores                        {seconds['score']:8.2f}s {seconds['peer_score']:21.2f}s")
    print(f"figures                              {'':9} {seconds['peer_evaluate']:21.2f}s")
    print(f"figures and {options.replicates} speaker draws        {seconds['evaluate']:8.2f}s", end="")
    print(f" {seconds['peer_evaluate'] + seconds['peer_bootstrap']:21.0f}s  (scaled from {_PEER_REPLICATES} draws)")
    print(f"read list / write scores             {seconds['read']:5.2f} / {seconds['write']:.2f}s")
    print(f"peak memory, MB ({memory['before']:.0f} before)         {memory['ours']:9.0f} {memory['peer']:22.0f}")
    print(f"difference: EER {figures['eer_difference']:.1e}, minDCF {figures['min_dcf_difference']:.1e}")
    if options.json:
        write_json(options.json, figures)
