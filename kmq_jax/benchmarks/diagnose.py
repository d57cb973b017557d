"""Every statistic of scores in `diagnose`, on a list of the size of VoxCeleb1-E and several quantized models: time."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.benchmarks import score
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.diagnosis import people, scores
from kmq_jax.diagnosis.diagnosis import GROUP_DRAWS
from kmq_jax.diagnosis.resample import SpeakerDraws
from kmq_jax.scoring.cosine import cosine_scores


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark; the defaults have the size of VoxCeleb1-E and four models."""
    flags.add_argument("--trials", type=int, default=579_818, help="trials, half of them targets")
    flags.add_argument("--utterances", type=int, default=145_375, help="utterances")
    flags.add_argument("--speakers", type=int, default=1_251, help="speakers")
    flags.add_argument("--models", type=int, default=4, help="quantized models beside the reference")
    flags.add_argument("--replicates", type=int, default=1000, help="bootstrap draws")
    flags.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def make(trials: int, utterances: int, speakers: int, models: int) -> tuple[scores.ScoredTrials, people.Recordings]:
    """Random embeddings about random speakers, the models' with more and more noise; their scores and recordings."""
    embeddings, speaker, listed = score.make(trials, utterances, speakers, 64, 1.2)
    rng = np.random.default_rng(1)
    full, test_only = {}, {}
    for i in range(models):
        noisy = embeddings + 0.1 * 2**i * rng.standard_normal(embeddings.shape, np.float32)
        full[models + 1 - i] = cosine_scores(noisy, noisy, listed.enrol, listed.test)
        test_only[models + 1 - i] = cosine_scores(embeddings, noisy, listed.enrol, listed.test)
    base = cosine_scores(embeddings, embeddings, listed.enrol, listed.test)
    enrol, test = speaker[listed.enrol], speaker[listed.test]
    names = [f"id{10000 + s}" for s in speaker.tolist()]
    recordings = people.Recordings(
        listed.names, listed.names, names, listed.enrol, listed.test,
        rng.uniform(4, 20, utterances), rng.uniform(5, 40, utterances),
        {name: "fm"[i % 2] for i, name in enumerate(sorted(set(names)))}, {},
    )  # fmt: skip
    return scores.scored_trials(base, full, test_only, listed.label, enrol, test), recordings


def main(args: argparse.Namespace) -> None:
    """Prints the times."""
    for name in ("trials", "utterances", "speakers", "models", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} (={getattr(args, name)}) must be at least 1")
    if args.utterances < args.speakers:
        raise UserError(f"--utterances (={args.utterances}) must be at least --speakers (={args.speakers})")
    trials, recordings = make(args.trials, args.utterances, args.speakers, args.models)
    kept: dict[str, Any] = {}

    def keep(name: str, task: Callable[[], Any]) -> Callable[[], None]:
        return lambda: kept.update({name: task()})

    def draws(count: int) -> SpeakerDraws:
        return SpeakerDraws(trials.enrol_speaker, trials.test_speaker, count)

    per_trial: dict[str, Callable[[], None]] = {
        "draws": keep("draws", lambda: (draws(args.replicates), draws(max(args.replicates // GROUP_DRAWS, 1)))),
        "drift": keep("drift", lambda: scores.drift_rows(trials, kept["draws"][0])),
        "flips": keep("flips", lambda: scores.all_flips(trials)),
        "flip rates": keep("rates", lambda: scores.flip_rows(trials, kept["flips"][0], kept["draws"][0])),
        "speakers": keep("speakers", lambda: people.speaker_rows(trials, kept["flips"][0], recordings)),
        "groups": keep("groups", lambda: people.group_rows(trials, kept["flips"][0], recordings, kept["draws"][1])),
        "worst trials": keep("worst", lambda: people.worst_trials(trials, kept["flips"][0], recordings)),
    }
    systems = {"EER and minDCF": keep("systems", lambda: scores.system_rows(trials, args.replicates))}
    seconds: dict[str, list[float]] = {name: [] for name in (*per_trial, *systems)}
    for _ in range(args.repeats):
        for name, task in (per_trial | systems).items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    total = sum(median[name] for name in per_trial)
    rate = [row["harmful_rate"] for row in kept["rates"] if row["binning"] == "none" and row["class"] == "all"]
    print(f"{args.trials:,} trials, {args.models} models, {args.speakers:,} speakers, {args.replicates} draws")
    for name, value in median.items():
        print(f"{name:16} {value:8.2f} s")
    print(f"statistics of trials, all with intervals: {total:.2f} s; EER and minDCF not among them")
    if args.json:
        write_json(args.json, {"trials": args.trials, "models": args.models, "replicates": args.replicates,
                               "seconds": median, "per_trial_seconds": total, "harmful_rates": rate})  # fmt: skip
