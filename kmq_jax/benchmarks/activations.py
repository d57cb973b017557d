"""What 8-bit activations cost in errors: models beside the same with floating-point ones, on the same trials."""

import numpy as np

from kmq_jax.benchmarks.extract import cosines, file_bytes
from kmq_jax.benchmarks.options import ActivationsBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.core.files import write_json
from kmq_jax.data import source, trials
from kmq_jax.metrics.paired import Errors
from kmq_jax.models.speaker_model import embed_all, load_model
from kmq_jax.scoring.cosine import cosine_scores


class _List:
    """A trial list on which each model is embedded and scored once."""

    def __init__(self, data: str, listed: str, options: ActivationsBench):
        self._options = options
        self.table = source.open_source(data)
        self.pairs = trials.open_trials(listed, self.table)
        speakers = np.unique(np.array(self.table.speakers), return_inverse=True)[1]  # a number for each utterance
        self.sides = speakers[self.pairs.enrol], speakers[self.pairs.test]
        self._known: dict[str, tuple[np.ndarray, Errors]] = {}

    def of(self, place: str) -> tuple[np.ndarray, Errors]:
        """A model's embeddings `[utterances, dim]`, and its errors on the list."""
        if place not in self._known:
            rows = embed_all(load_model(place), self.table, engine=self._options.engine)
            scores = cosine_scores(rows, rows, self.pairs.enrol, self.pairs.test)
            errors = Errors.of(scores, self.pairs.label, *self.sides, self._options.replicates)
            self._known[place] = rows, errors
        return self._known[place]


def compare(options: ActivationsBench) -> Figures:
    """Measures all pairs on all lists.

    Returns:
        `sets`, each with `data`, `trials`, `targets`, `speakers`, `utterances` and `rows`, one a pair: `name`, `bytes`,
        `eer` of the model and `float_eer` of the one beside it, in percent; the changes between them, as
        `metrics.paired.Errors.minus` gives them; the same against full precision (`full_...`); and `cosine`, the mean
        over utterances of the cosine of both models' embeddings.
    """
    sets = []
    for data, listed in zip(options.data, options.trials):
        one = _List(data, listed, options)
        _, full = one.of(options.reference)
        about = {"data": data, "trials": len(one.pairs), "targets": int(one.pairs.label.sum()), "full_eer": full.eer}
        about |= {"speakers": len(np.union1d(*one.sides)), "utterances": len(one.table)}
        sets.append({**about, "rows": [_row(one, full, *pair) for pair in options.named_pairs]})
    return {"engine": options.engine, "sets": sets}


def _row(one: _List, full: Errors, name: str, place: str, beside: str) -> Figures:
    (rows, ours), (floating, theirs) = one.of(place), one.of(beside)
    return {
        "name": name,
        "bytes": file_bytes(place),
        "eer": ours.eer,
        "float_eer": theirs.eer,
        **ours.minus(theirs),
        **{f"full_{key}": value for key, value in ours.minus(full).items()},
        "cosine": float(cosines(rows, floating).mean()),
    }


def main(options: ActivationsBench) -> None:
    """Prints the comparison."""
    found = compare(options)
    for one in found["sets"]:
        print(f"{one['data']}: {one['trials']:,} trials, full precision EER {one['full_eer']:.2f} %")
        for row in one["rows"]:
            interval = row["eer_change_ci95"]
            span = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
            print(
                f"  {row['name']}: {row['bytes'] / 1e6:.2f} MB, EER {row['eer']:.2f} %; against floating-point "
                f"activations {row['eer_change']:+.2f}{span} points, cosine {row['cosine']:.4f}"
            )
    if options.json:
        write_json(options.json, found)
