"""What the page of a diagnosis says, beside what was found."""

import numpy as np

from kmq_jax.diagnosis import layers, people, report, scores
from kmq_jax.diagnosis.diagnosis import diagnose_scores
from kmq_jax.diagnosis.options import DiagnosisOptions


def test_the_page_names_only_what_was_measured(tmp_path):
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(8), 3)
    enrol, test = np.triu_indices(len(speaker), 1)
    labels = speaker[enrol] == speaker[test]
    base = labels + 0.4 * rng.standard_normal(len(labels))
    full = {2: base + 0.3 * rng.standard_normal(len(labels))}
    trials = scores.scored_trials(base, full, None, labels, speaker[enrol], speaker[test])
    ids = [f"u{i}" for i in range(len(speaker))]
    names = [f"s{i}" for i in speaker]
    recordings = people.Recordings(ids, ids, names, enrol, test, None, None, {}, {})
    found = diagnose_scores(trials, recordings, DiagnosisOptions(margin_bins=6, replicates=0))
    found.notes.update(data=None, trial_list=None)
    # Layers as they are without `layer_utterances`: nothing is known of what each does alone.
    weights = rng.standard_normal((4, 4))
    row = {"layer": "a", "component": "stem", "block": "a", "weights": 16, "bits": 2}
    row |= layers.weight_row(weights, weights + 0.1) | {"codebook_use": 1.0, "tensor_bits": 2}
    row |= dict.fromkeys(("hessian_trace", "predicted_loss", "activation_sqnr_db", "damage", "damage_cosine"))
    found.tables["layers"], found.tables["correlations"] = [row], layers.correlation_rows([row])
    report.write(tmp_path, found)
    page = (tmp_path / "report.html").read_text()
    assert f"{len(labels)} trials ({labels.sum()} target) of 8 speakers, 24 utterances" in page
    assert not list(tmp_path.glob("rules-*.json")) and "--rules=" not in page
    assert not (tmp_path / "figure-distortion.png").exists() and "Right: mean |score drift|" not in page
    near = next(one for one in found.tables["flips"] if one["binning"] == "equal-mass" and one["bin"] == 0)
    share = round(100 * near["trials"] / len(labels))
    assert share == 17 and f"of the harmful flips lie in the {share} % of trials nearest the threshold" in page
