"""Every statistic of scores in `diagnose`, on a list of the size of VoxCeleb1-E and several quantized models: time."""

from collections.abc import Callable

import numpy as np

from kmq_jax.benchmarks import score
from kmq_jax.benchmarks.options import DiagnoseBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians, write_figures
from kmq_jax.diagnosis import people, scores
from kmq_jax.diagnosis.diagnosis import GROUP_DRAWS
from kmq_jax.diagnosis.resample import SpeakerDraws
from kmq_jax.scoring.cosine import cosine_scores


def make(trials: int, utterances: int, speakers: int, models: int) -> tuple[scores.ScoredTrials, people.Recordings]:
    """Scores and recordings of random embeddings about random speakers; the fewer bits, the more noise."""
    embeddings, speaker, listed = score.make(trials, utterances, speakers, 64, 1.2)
    rng = np.random.default_rng(1)
    full, test_only = {}, {}
    for i in range(models):  # from the most bits down; each has twice the noise of the one before
        noisy = embeddings + 0.1 * 2**i * rng.standard_normal(embeddings.shape, np.float32)
        full[models + 1 - i] = cosine_scores(noisy, noisy, listed.enrol, listed.test)
        # The enrolled side stays in full precision.
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


def main(options: DiagnoseBench) -> None:
    """Prints the times."""
    trials, recordings = make(options.trials, options.utterances, options.speakers, options.models)
    kept: Figures = {}

    def keep(name: str, task: Callable[[], object]) -> Callable[[], None]:
        return lambda: kept.update({name: task()})

    def draws(count: int) -> SpeakerDraws:
        return SpeakerDraws(trials.enrol_speaker, trials.test_speaker, count)

    # In this order: later tasks read from `kept` what earlier ones put there.
    per_trial: dict[str, Callable[[], None]] = {
        "draws": keep("draws", lambda: (draws(options.replicates), draws(max(options.replicates // GROUP_DRAWS, 1)))),
        "drift": keep("drift", lambda: scores.drift_rows(trials, kept["draws"][0])),
        "flips": keep("flips", lambda: scores.all_flips(trials)),
        "flip rates": keep("rates", lambda: scores.flip_rows(trials, kept["flips"][0], kept["draws"][0])),
        "speakers": keep("speakers", lambda: people.speaker_rows(trials, kept["flips"][0], recordings)),
        "groups": keep("groups", lambda: people.group_rows(trials, kept["flips"][0], recordings, kept["draws"][1])),
        "worst trials": keep("worst", lambda: people.worst_trials(trials, kept["flips"][0], recordings)),
    }
    systems = {
        "EER and minDCF": keep(
            "systems", lambda: scores.system_rows(trials, scores.system_draws(trials, options.replicates))
        )
    }
    median = medians(in_turns(per_trial | systems, options.repeats, warm_up=0))
    total = sum(median[name] for name in per_trial)
    rate = [row["harmful_rate"] for row in kept["rates"] if row["binning"] == "none" and row["class"] == "all"]
    print(
        f"{options.trials:,} trials, {options.models} models, {options.speakers:,} speakers, {options.replicates} draws"
    )
    for name, value in median.items():
        print(f"{name:16} {value:8.2f} s")
    print(f"statistics of trials, all with intervals: {total:.2f} s; EER and minDCF not among them")
    if options.json:
        about: Figures = {"trials": options.trials, "models": options.models, "replicates": options.replicates}
        found = {"seconds": median, "per_trial_seconds": total, "harmful_rates": rate}
        write_figures(options.json, "diagnose", about | found)
