"""How a study calibrates its cascades, and how it halves lists that enrol models."""

import importlib.util
from pathlib import Path

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.data.source import open_source
from kmq_jax.data.trials import open_trials
from kmq_jax.study import cascades
from kmq_jax.study.options import EvaluationSet, StudyOptions
from kmq_jax.study.pipeline import options_of
from kmq_jax.study.steps import Steps

DATA = "synthetic:dev?speakers=6&utterances=3"
NESTED = {"epochs": {"2": 1.0, "nested": 1.0}}
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


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (("trained", (2, 4)), {}, "4 bits in 'distilled'"),
        (("kmqat", (2, 32)), {}, "2 bits in 'kmqat'"),
        (("distilled-nested", (2, 4)), {}, "2 bits in 'distilled-nested'"),
        (("distilled-nested", (2, 4)), NESTED | {"nested": False}, "2 bits in 'distilled-nested'"),
        (("ptq-nested", (2, 4)), {"bits": (2,)}, "2 bits in 'ptq-nested'"),
        (("ptq", (2, 3)), {}, "3 bits in 'ptq'"),
    ],
)
def test_a_cascade_of_networks_that_are_not_made_is_refused_before_any_is(plan, changes, message):
    given = {"bits": (4, 2), "epochs": {"2": 1.0}, "calibrate": "dev", "cascades": [plan]}
    options = StudyOptions.of({"evaluate": SETS, **given, **changes})
    with pytest.raises(UserError, match=f"study.cascades: there is no network of {message}"):
        cascades.check_plans(options)


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (("kmqat", (2, 32)), {"also": ("kmqat",)}),
        (("distilled-nested", (2, 4)), NESTED),
        (("ptq-nested", (2, 4)), {}),
        (("ptq", (2, 4, 32)), {}),
    ],
)
def test_a_cascade_of_networks_that_are_made_is_not(plan, changes):
    given = {"bits": (4, 2), "epochs": {"2": 1.0}, "calibrate": "dev", "cascades": [plan]}
    cascades.check_plans(StudyOptions.of({"evaluate": SETS, **given, **changes}))


CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = [
    ("campplus_so762", None), ("ge2e_so762", None), ("imported", None), ("quickstart", None), ("quickstart", "smoke"),
    ("paper_resnet36", None), ("paper_resnet36", "smoke"), ("paper_resnet200", "public"),
    ("so762_resnet36_small", None), ("so762_resnet36_small", "levels"), ("so762_resnet36_small", "smoke"),
    ("wespeaker_so762", None), ("wespeaker_so762", "smoke"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arg"), STUDIES)
def test_the_studies_at_hand_make_the_networks_of_their_cascades(name, arg):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cascades.check_plans(options_of(module.get_config(arg)))


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
