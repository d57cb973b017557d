"""Scoring and evaluating a long trial list beside plain numpy and scikit-learn's `roc_curve`: time, memory, figures."""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.data.trials import Trials, read_trials
from kmq_jax.metrics.evaluate import evaluate
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.scoring.run import write_scores

_PEER_REPLICATES = 3  # of the bootstrap by `roc_curve`: its time is scaled up


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark; the defaults have the size of VoxCeleb1-E."""
    flags.add_argument("--trials", type=int, default=579_818, help="trials, half of them targets")
    flags.add_argument("--utterances", type=int, default=145_375, help="utterances")
    flags.add_argument("--speakers", type=int, default=1_251, help="speakers")
    flags.add_argument("--dim", type=int, default=256, help="dimensions of an embedding")
    flags.add_argument("--replicates", type=int, default=1000, help="bootstrap draws")
    flags.add_argument("--spread", type=float, default=2.2, help="of utterances about their speaker: sets the EER")
    flags.add_argument("--repeats", type=int, default=3, help="timed rounds, each side in turn; the median counts")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def make(trials: int, utterances: int, speakers: int, dim: int, spread: float) -> tuple[np.ndarray, np.ndarray, Trials]:
    """Random embeddings about random speakers -> `[utterances, dim]`, the speakers `[utterances]`, and trials."""
    rng = np.random.default_rng(0)
    speaker = np.arange(utterances) % speakers
    centres = rng.standard_normal((speakers, dim), np.float32)
    embeddings = centres[speaker] + spread * rng.standard_normal((utterances, dim), np.float32)
    enrol = rng.integers(utterances, size=trials)
    other = rng.integers(utterances, size=trials)
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
        peer_metrics(scores, labels, np.where(enrol == test, draw[enrol], draw[enrol] * draw[test]))


def _memory() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(args: argparse.Namespace) -> None:
    """Prints the comparison."""
    for name in ("trials", "utterances", "speakers", "dim", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} (={getattr(args, name)}) must be at least 1")
    if args.utterances < args.speakers:
        raise UserError(f"--utterances (={args.utterances}) must be at least --speakers (={args.speakers})")
    embeddings, speaker, trials = make(args.trials, args.utterances, args.speakers, args.dim, args.spread)
    enrol, test = speaker[trials.enrol], speaker[trials.test]
    before = _memory()

    kept: dict[str, Any] = {}

    def keep(name: str, task: Callable[[], Any]) -> Callable[[], None]:
        return lambda: kept.update({name: task()})

    with tempfile.TemporaryDirectory() as directory:
        listing, out = Path(directory, "trials.txt"), Path(directory, "scores.txt")
        lines = zip(trials.label.tolist(), trials.enrol.tolist(), trials.test.tolist())
        listing.write_text("".join(f"{int(y)} {trials.names[e]} {trials.names[t]}\n" for y, e, t in lines))
        ours: dict[str, Callable[[], None]] = {
            "score": keep("scores", lambda: cosine_scores(embeddings, embeddings, trials.enrol, trials.test)),
            "evaluate": keep(
                "result", lambda: evaluate(kept["scores"], trials.label, enrol, test, replicates=args.replicates)
            ),
            "read": keep("listed", lambda: read_trials(listing, trials.names)),
            "write": lambda: write_scores(str(out), trials, kept["scores"]),
        }
        peer: dict[str, Callable[[], None]] = {
            "peer_score": keep("peer_scores", lambda: peer_score(embeddings, trials)),
            "peer_evaluate": keep("peer", lambda: peer_metrics(kept["peer_scores"], trials.label)),
            "peer_bootstrap": lambda: peer_bootstrap(kept["peer_scores"], trials.label, enrol, test),
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*ours, *peer)}
        memory = 0.0
        for _ in range(args.repeats):
            for name, task in (ours | peer).items():
                start = time.perf_counter()
                task()
                seconds[name].append(time.perf_counter() - start)
                memory = memory or (_memory() if name == "write" else 0.0)  # before the peer's first turn
    median = {name: statistics.median(times) for name, times in seconds.items()}
    median["peer_bootstrap"] *= args.replicates / _PEER_REPLICATES

    result, (rate, cost) = kept["result"], kept["peer"]
    total, peer_total = (median[f"{side}score"] + median[f"{side}evaluate"] for side in ("", "peer_"))
    figures = {
        "trials": args.trials,
        "dim": args.dim,
        "seconds": median,
        "score_and_evaluate_seconds": total,
        "peer_without_intervals_seconds": peer_total,
        "peer_with_intervals_seconds": peer_total + median["peer_bootstrap"],
        "memory_mb": {"before": before, "ours": memory, "peer": _memory()},
        "eer": result["eer"],
        "eer_ci95": result["eer_ci95"],
        "eer_difference": abs(result["eer"] / 100 - rate),
        "min_dcf_difference": abs(result["min_dcf"] - cost),
    }
    print(f"{args.trials:,} trials x {args.dim}, EER {result['eer']:.3f} % {result['eer_ci95']}")
    print(f"                                     {'ours':>9} {'numpy + scikit-learn':>22}")
    print(f"cosine scores                        {median['score']:8.2f}s {median['peer_score']:21.2f}s")
    print(f"figures                              {'':9} {median['peer_evaluate']:21.2f}s")
    print(f"figures and {args.replicates} speaker draws        {median['evaluate']:8.2f}s", end="")
    print(f" {median['peer_evaluate'] + median['peer_bootstrap']:21.0f}s  (scaled from {_PEER_REPLICATES} draws)")
    print(f"read list / write scores             {median['read']:5.2f} / {median['write']:.2f}s")
    print(f"peak memory, MB ({before:.0f} before)         {memory:9.0f} {_memory():22.0f}")
    print(f"difference: EER {figures['eer_difference']:.1e}, minDCF {figures['min_dcf_difference']:.1e}")
    if args.json:
        write_json(args.json, figures)
