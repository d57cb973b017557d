"""Published figures stand beside those that were measured, where they were."""

import importlib.util
import re
from pathlib import Path

from kmq_jax.study.options import StudyOptions
from kmq_jax.study.published import comparison

CONFIGS = Path(__file__).parents[2] / "configs"


def row(bits, method, eer, dcf):
    return {
        "bits": bits,
        "method": method,
        "groups": {"g": eer},
        "sets": {"a": {"min_dcf": dcf}, "b": {"min_dcf": 0.4}},
    }


def diagnosed(drift):
    kinds = [{"bits": 2, "kind": kind, "class": "all", "mean_abs": drift} for kind in ("full", "test-only")]
    kinds[0]["pearson"] = 0.99
    kinds.append({"bits": 2, "kind": "full", "class": "target", "mean": -drift})
    flips = [
        {"bits": 2, "binning": "equal-mass", "bin": i, "harmful_rate": rate} for i, rate in enumerate((0.2, 0.1, 0))
    ]
    kept = [("stage1", -5), ("stage3", 20), ("stage2", 30), ("stem", None)]
    retention = [{"bits": 2, "experiment": "retention", "component": c, "drift_recovery": d} for c, d in kept]
    return {"drift": kinds, "flips": flips, "retention": retention}


SUMMARY = {
    "rows": [row(32, "full precision", 1.0, 0.1), row(2, "without training", 9.0, 0.9), row(2, "trained", 2.0, 0.2)],
    "cascades": [{"groups": {"g": 7.0}}, {"groups": {"g": 1.5}, "gates": "published"}],
    "members": {"g": ["a", "b"]},
    "diagnosis": {"a": diagnosed(0.1), "b": diagnosed(0.3)},
    "published": {"g": {"32": 1.1, "2": 2.2, "4": 1.2, "cascade": 1.6}},
    "published_figures": {
        "min_dcf": {"g": {"2": 0.25, "3": 0.2}},
        "drift": {"g": {"test-only": {"2": 0.15}}},
        "shift": {"a": {"2": {"target": -0.2, "nontarget": 0.1}}},
        "pearson": {"a": {"2": 0.992}, "d": {"2": 0.986}},
        "flips": {"a": {"2": [0.25, 0.15, "~0"]}, "c": {"2": [0.3]}},
        "order": ["stage2", "stage3"],
    },
}


def test_thirds_are_compared_with_thirds_alone():
    quarters = [{"bits": 2, "binning": "equal-mass", "bin": i, "harmful_rate": 0.1} for i in range(4)]
    summary = SUMMARY | {"diagnosis": {"a": diagnosed(0.1) | {"flips": quarters}}}
    found = {row["figure"]: row["measured"] for row in comparison(summary) if row["where"] == "a"}
    assert found["harmful flips, near"] is None and found["harmful flips, far"] is None


def test_mixed_precision_stands_beside_what_was_asked_for_though_its_mean_came_out_otherwise():
    rows = [*SUMMARY["rows"], row(3.13, "trained, mixed", 1.75, 0.2)]
    summary = SUMMARY | {"rows": rows, "published": {"g": {"3.144": 1.5, "3": 1.25}}}
    found = {row["bits"]: row["measured"] for row in comparison(summary) if row["figure"] == "EER %"}
    assert found == {"3.144": 1.75, "3": None}


def test_every_published_figure_has_its_measured_one():
    found = {(r["figure"], r["where"], r["bits"]): (r["published"], r["measured"]) for r in comparison(SUMMARY)}
    assert found.pop(("EER %", "g", "32")) == (1.1, 1.0)
    assert found.pop(("EER %", "g", "2")) == (2.2, 2.0)  # of the trained network
    assert found.pop(("EER %", "g", "4")) == (1.2, None)
    assert found.pop(("EER %", "g", "cascade")) == (1.6, 1.5)  # of the one whose gates are the paper's
    published, measured = found.pop(("minDCF", "g", "2"))
    assert (published, round(measured, 9)) == (0.25, 0.3)
    assert found.pop(("minDCF", "g", "3")) == (0.2, None)
    published, measured = found.pop(("mean |drift|, test-only", "g", "2"))
    assert (published, round(measured, 9)) == (0.15, 0.2)
    assert found.pop(("mean drift, target", "a", "2")) == (-0.2, -0.1)
    assert found.pop(("mean drift, nontarget", "a", "2")) == (0.1, None)
    assert found.pop(("correlation", "a", "2")) == (0.992, 0.99)
    assert found.pop(("correlation", "d", "2")) == (0.986, None)
    assert found.pop(("harmful flips, near", "a", "2")) == (0.25, 0.2)
    assert found.pop(("harmful flips, mid", "a", "2")) == (0.15, 0.1)
    assert found.pop(("harmful flips, far", "a", "2")) == ("~0", 0.0)
    assert found.pop(("harmful flips, near", "c", "2")) == (0.3, None)
    assert found.pop(("components, most first", "a", "")) == ("stage2, stage3", "stage2, stage3")
    assert found.pop(("components, most first", "b", "")) and not found


def test_the_papers_studies_evaluate_as_published():
    """Its sets, all diagnosed; enrolment models; its gate rule beside ours; its figures to compare with."""
    told_in = {}  # how sets are given stands in the one, to which the other points
    for name in ("paper_resnet36", "paper_resnet200"):
        spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        study = StudyOptions.of(config.study.to_dict())
        told_in[name] = module.__doc__
        flags = re.findall(r"--config\.study\.evaluate\.(\w+)\.(\w+)=", told_in["paper_resnet36"])
        assert "configs/paper_resnet36.py" in module.__doc__
        assert {("cnceleb", "models"), ("voxtube", "trials"), ("commonbench", "data")} <= set(flags)
        assert all(option in config.study.evaluate[name] for name, option in flags)
        assert set(study.diagnose) == {"vox1_o", "vox1_e", "vox1_h", "cnceleb", "commonbench", "voxtube"}
        told = [study.published_figures.get(kind, {}) for kind in ("shift", "pearson", "flips")]
        assert {name for one in told for name in one} <= set(study.diagnose)  # else nothing could stand beside them
        assert study.sets["vox1_o"].models is None
        assert study.sets["cnceleb"].data == "data/cnceleb/CN-Celeb_flac/eval"
        assert study.sets["cnceleb"].lists == [
            "data/cnceleb/CN-Celeb_flac/eval/lists/trials.lst",
            "data/cnceleb/CN-Celeb_flac/eval/lists/enroll.map",
        ]
        assert study.sets["commonbench"].trials.endswith("comparisons.txt")
        assert [(plan.bits, plan.gates) for plan in study.cascades[:2]] == [
            ((2, 3, 4), "published"),
            ((2, 3, 4), "own"),
        ]
        assert {"drift", "flips", "order"} <= set(study.published_figures)
