"""Which networks a study diagnoses."""

import json
from pathlib import Path

import pytest

from kmq_jax.study import pipeline
from kmq_jax.study.networks import Network, Run
from kmq_jax.study.options import StudyOptions

DATA = "synthetic:dev?speakers=6&utterances=3"
FULL = Network("fp32", "full precision", 32, Path("fp32"))


class AtOnce:
    """Steps that keep nothing."""

    def __init__(self, root):
        self.root, self.needs = root, None

    def run(self, name, about, needs, directory, action, **how):
        self.needs = needs
        action(self.root)
        return self.root


def fitted(bits):
    return Network(f"ptq-{bits}", "without training", bits, Path(f"ptq-{bits}"), run=Run(str(bits), int(bits)))


def trained(bits):
    run = Run(str(bits), bits)
    return Network(run.step, "trained", bits, Path(run.step), run=run)


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        ([fitted(4), trained(4), fitted(2), trained(2)], {4: "distilled-4", 2: "distilled-2"}),
        ([fitted(4), fitted(2), trained(2)], {2: "distilled-2"}),  # a mixture would compare two ways of making
        ([fitted(4), fitted(3.144), fitted(2)], {4: "ptq-4", 2: "ptq-2"}),
    ],
)
def test_the_trained_ones_and_else_the_fitted_ones(tmp_path, monkeypatch, networks, expected):
    def diagnose(reference, models, *rest):
        assert str(reference) == "fp32" and {bits: str(path) for bits, path in models.items()} == expected

    def write(out, found):
        tables = dict.fromkeys(("systems", "retention", "correlations", "flips", "drift"), [])
        (out / "diagnosis.json").write_text(json.dumps({**tables, "notes": {"knees": {}}}))

    monkeypatch.setattr(pipeline, "diagnose", diagnose)
    monkeypatch.setattr(pipeline.diagnosis_report, "write", write)
    options = StudyOptions.of({"evaluate": {"dev": {"data": DATA, "trials": DATA}}, "bits": (4, 2)})
    steps = AtOnce(tmp_path)
    pipeline.run_diagnosis(steps, options, [FULL, *networks], options.sets["dev"])
    assert sorted(steps.needs) == sorted(["fp32", *expected.values()])
