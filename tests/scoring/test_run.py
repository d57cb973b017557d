"""Files and cohorts that scoring refuses; whole lists are scored in tests/integration."""

from types import SimpleNamespace

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.run import cohort_members, read_calibration, save_calibration
from kmq_jax.scoring.table import EmbeddingTable


def scored(targets, nontargets):
    label = np.arange(len(targets) + len(nontargets)) < len(targets)
    return SimpleNamespace(
        scores=np.float32([*targets, *nontargets]), trials=SimpleNamespace(label=label), kind="cosine", model="r34"
    )


def test_no_calibration_is_written_that_could_not_be_read(tmp_path):
    with pytest.raises(UserError, match="c.json: no calibration .* targets score below nontargets"):
        save_calibration(tmp_path / "c.json", scored([0.1, 0.2], [0.3, 0.15]))
    assert not (tmp_path / "c.json").exists()
    save_calibration(tmp_path / "c.json", scored([0.3, 0.15], [0.1, 0.2]))
    assert read_calibration(tmp_path / "c.json", "cosine").scale > 0


def test_a_calibration_for_another_models_scores_is_warned_of(tmp_path, capsys):
    save_calibration(tmp_path / "c.json", scored([0.3, 0.15], [0.1, 0.2]))
    for own in ("r34", None):  # None: not known
        read_calibration(tmp_path / "c.json", "cosine", own)
    assert not capsys.readouterr().err
    read_calibration(tmp_path / "c.json", "cosine", "r34 at 2 bits")
    assert f"warning: --calibration={tmp_path / 'c.json'} is for the scores of another model" in capsys.readouterr().err


@pytest.mark.parametrize("top_n", [None, 2])
def test_a_cohort_of_one_is_named(top_n):
    cohort = EmbeddingTable(("a",), (), None, np.ones((1, 4), np.float32), "c.npz")
    with pytest.raises(UserError, match=r"the cohort c.npz makes 1 members: it takes two or more"):
        cohort_members(cohort, top_n, means=False)
