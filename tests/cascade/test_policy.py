"""Policies: what they may hold, their file, and the maps to the reference's scores."""

import json
import math

import numpy as np
import pytest

from kmq_jax.cascade.policy import CascadePolicy, fit_map, read_policy, symmetric_gates
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap

LINE = AffineMap(1.0, 0.0)


def policy(**changes):
    fields = {
        "bits": (2, 3, 4),
        "maps": (IsotonicMap(np.array([-1.0, 0.1, 1.0]), np.array([-0.9, 0.0, 1 / 3])), LINE, LINE),
        "gates": ((0.1, math.inf), (0.2, 0.25)),
        "threshold": 0.2,
        "llr_maps": (LINE, AffineMap(2.0, -1.0), LINE),
        "models": ("a", None, "c"),
        "dims": (16, 16, 32),
        "notes": {"why": "test"},
        "vad": True,
    } | changes
    return CascadePolicy(**fields)


def test_round_trip_keeps_every_number(tmp_path):
    policy().save(tmp_path / "p.json")
    found, made = read_policy(tmp_path / "p.json"), policy()
    for name in ("bits", "gates", "threshold", "llr_maps", "enrolment", "models", "dims", "notes", "vad"):
        assert getattr(found, name) == getattr(made, name)
    np.testing.assert_array_equal(found.maps[0].y, made.maps[0].y)
    assert found.maps[1] == LINE
    text = json.loads((tmp_path / "p.json").read_text())
    assert text["levels"][0]["gate"] == [0.1, None]  # infinity is not JSON


def test_a_file_that_calls_levels_stages_is_read(tmp_path):
    policy().save(tmp_path / "p.json")
    text = json.loads((tmp_path / "p.json").read_text())
    text["stages"] = text.pop("levels")
    del text["vad"]
    (tmp_path / "p.json").write_text(json.dumps(text))
    found = read_policy(tmp_path / "p.json")
    assert (found.gates, found.vad) == (policy().gates, None)


def test_a_policy_of_speech_alone_is_told_from_whole_recordings(tmp_path, capsys):
    for fitted, now in ((True, True), (True, None), (None, False)):
        policy(vad=fitted).warn_of_vad(now)
    assert capsys.readouterr().err == ""
    policy().warn_of_vad(False)
    assert "fitted with vad, now it is without" in capsys.readouterr().err
    policy().save(tmp_path / "p.json")
    text = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps(text | {"vad": 1}))
    with pytest.raises(UserError, match="1 is not a truth value"):
        read_policy(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (2, 4, 3)}, "must ascend"),
        ({"bits": (2, 3)}, "one gate less"),
        ({"gates": ((0.1, 0.15), (0.2, 0.2))}, "must hold the threshold"),
        ({"gates": ((math.nan, 0.5), (0.2, 0.2))}, "must hold the threshold"),
        ({"threshold": math.inf}, "finite"),
        ({"enrolment": "none"}, "enrolment 'none'"),
        ({"llr_maps": (LINE,)}, "as many maps"),
        ({"llr_maps": ()}, "as many maps"),
        ({"bits": (2, 3, 40000)}, "at most 64"),
        ({"maps": (LINE, LINE, AffineMap(1e39, 0.0))}, r"at most 1e\+30, got 1e\+39"),
        ({"llr_maps": (LINE, LINE, AffineMap(1.0, -1e39))}, r"at most 1e\+30"),
        ({"maps": (LINE, LINE, IsotonicMap(np.array([0.0, 1e39]), np.array([0.0, 1.0])))}, r"at most 1e\+30"),
    ],
)
def test_impossible_policies_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        policy(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value.update(kind="cat"), "no cascade policy"),
        (lambda value: value.update(version=99), "version is 99"),
        (lambda value: value.pop("threshold"), "lacks 'threshold'"),
        (lambda value: value["levels"][1].pop("gate"), "lacks 'gate'"),
        (lambda value: value["levels"][0].update(bits="2"), "whole number"),
        (lambda value: value["levels"][0].update(gate=[0.1]), "p.json"),
        (lambda value: value["levels"][0]["map"].update(x=[3, 2, 1]), "impossible numbers"),
        (lambda value: value["levels"][1]["map"].update(scale=-1.0), "scale -1.0 falls"),
        (lambda value: value["levels"][1]["llr"].update(scale=-2.0), "scale -2.0 falls"),
        (lambda value: value["levels"][0]["map"].update(y=[0.3, 0.2, 0.1]), "impossible numbers"),
        (lambda value: value.update(levels=7), "p.json"),
    ],
)
def test_damaged_files_are_named(tmp_path, edit, message):
    policy().save(tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    edit(value)
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        read_policy(tmp_path / "p.json")


def test_other_models_are_refused():
    made = policy()
    made.check(2, 0, 16, "a", "e.npz")
    made.check(2, 0, 16, None, "e.npz")  # a file that does not say
    made.check(3, 1, 16, "anything", "e.npz")  # a policy that does not know
    with pytest.raises(UserError, match=r"e\.npz is of the model b"):
        made.check(2, 0, 16, "b", "e.npz")
    with pytest.raises(UserError, match="17 dimensions"):
        made.check(2, 0, 17, "a", "e.npz")
    with pytest.raises(UserError, match="has 2 bits"):
        made.check(3, 0, 16, "a", "e.npz")


def test_symmetric_gates_are_the_papers():
    assert symmetric_gates(0.5, [0.25, 0]) == ((0.25, 0.75), (0.5, 0.5))


def test_affine_map_is_the_least_squares_line_and_never_falls():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(500)
    y = 0.7 * x - 0.1 + 0.05 * rng.standard_normal(500)
    fitted = fit_map("affine", x, y, np.zeros(500, bool))
    np.testing.assert_allclose((fitted.scale, fitted.offset), np.polyfit(x, y, 1), rtol=1e-10)
    assert fit_map("affine", x, -y, np.zeros(500, bool)).scale == 0
    constant = fit_map("affine", np.ones(5), np.arange(5.0), np.zeros(5, bool))
    assert (constant.scale, constant.offset) == (0, 2)


def test_logistic_map_gives_both_systems_the_same_likelihood_ratio():
    rng = np.random.default_rng(1)
    labels = np.arange(4000) % 2 == 0
    reference = labels + 0.5 * rng.standard_normal(4000)
    fitted = fit_map("logistic", 3 * reference + 2, reference, labels)  # the same evidence on another scale
    np.testing.assert_allclose((fitted.scale, fitted.offset), (1 / 3, -2 / 3), rtol=1e-5)
    with pytest.raises(UserError, match="no target"):
        fit_map("logistic", reference, reference, np.zeros(4000, bool))
    with pytest.raises(UserError, match="below nontargets"):
        fit_map("logistic", reference, -reference, labels)


@pytest.mark.parametrize("kind", ["isotonic", "affine"])
def test_maps_never_fall_even_on_tied_and_constant_scores(kind):
    rng = np.random.default_rng(2)
    for scores in (np.round(rng.standard_normal(300), 1), np.ones(300), rng.standard_normal(300)):
        fitted = fit_map(kind, scores, rng.standard_normal(300), np.zeros(300, bool))
        assert (np.diff(fitted(np.linspace(-5, 5, 1001))) >= 0).all()


def test_unknown_map():
    with pytest.raises(UserError, match="map 'cubic'"):
        fit_map("cubic", [0.0], [0.0], [True])


def test_no_trials_make_no_map():
    for kind in ("affine", "isotonic", "logistic"):
        with pytest.raises(UserError):
            fit_map(kind, [], [], [])
