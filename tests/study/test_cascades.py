"""How a study calibrates its cascades, and how it halves lists that enrol models."""

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.data.source import open_source
from kmq_jax.data.trials import open_trials
from kmq_jax.study import cascades
from kmq_jax.study.options import EvaluationSet, StudyOptions
from kmq_jax.study.steps import Steps

DATA = "synthetic:dev?speakers=6&utterances=3"
SETS = {"dev": {"data": DATA, "trials": DATA}}


def planned(tmp_path, *plan):
    options = StudyOptions.of({"evaluate": SETS, "calibrate": "dev", "cascades": [plan]})
    return cascades.StudiedCascade(Steps(tmp_path), options, options.cascades[0], None, ())


def test_the_papers_gates_stand_beside_ours(tmp_path):
    ours = planned(tmp_path, "distilled", (2, 4))
    theirs = planned(tmp_path, "distilled", (2, 4), "published")
    assert (theirs.how.objective, theirs.how.symmetric, theirs.how.cost) == ("eer", True, "sequential")
    assert (ours.how.objective, ours.how.symmetric) == ("flips", False)
    assert theirs.name == f"{ours.name}-published" and theirs.about != ours.about
    with pytest.raises(UserError, match="gates"):
        planned(tmp_path, "distilled", (2, 4), "best")


def test_new_bits_are_counted_where_codebooks_nest(tmp_path):
    assert planned(tmp_path, "distilled-nested", (2, 4)).how.nests
    assert not planned(tmp_path, "distilled", (2, 4)).how.nests


def test_halves_of_a_list_that_enrols_models(tmp_path):
    table = open_source(DATA)
    names = list(dict.fromkeys(table.speakers))
    members = {name: [i for i, s in zip(table.ids, table.speakers) if s == name] for name in names}
    (tmp_path / "models").write_text("".join(f"m-{name} {' '.join(ids[:2])}\n" for name, ids in members.items()))
    lines = [f"m-{one} {members[two][2]} {int(one == two)}\n" for one in names for two in names]
    (tmp_path / "trials").write_text("".join(lines))
    evaluated = EvaluationSet(name="dev", data=DATA, trials=str(tmp_path / "trials"), models=str(tmp_path / "models"))
    place = cascades.halve(Steps(tmp_path / "study"), evaluated)
    seen = []
    for half in "ab":
        pairs = open_trials(str(place / f"{half}.txt"), table, evaluated.models)
        enrolled = {pairs.names[name].removeprefix("m-") for name in pairs.enrol_name}
        tested = {table.speakers[row] for row in pairs.test}
        assert enrolled == tested and len(enrolled) == 3 and len(pairs) == 9 and pairs.label.sum() == 3
        seen.append(enrolled)
    assert not seen[0] & seen[1]
