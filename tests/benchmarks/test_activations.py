"""Models with 8-bit activations beside others: the figures of `bench activations`, and its table."""

import json

import numpy as np
import pytest

from kmq_jax.benchmarks import activations
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.study.bench_tables import activations_table

DATA = "synthetic:dev?speakers=4&utterances=4"
FLAGS = ["--reference=full", "--pair=W4A8=a,b", f"--data={DATA}", f"--trials={DATA}"]


def test_every_model_is_embedded_once_and_compared_with_the_other(monkeypatch, tmp_path, capsys):
    """Embeddings are made up: what runs networks has tests of its own."""
    made = {name: np.random.default_rng(i).normal(size=(16, 8)) for i, name in enumerate(("full", "a", "b"))}
    loaded = []
    monkeypatch.setattr(activations, "load_model", lambda place: loaded.append(place) or place)
    monkeypatch.setattr(activations, "embed_all", lambda model, table, engine: made[model])
    monkeypatch.setattr(activations, "file_bytes", lambda place: 7)
    bench.run("activations", [*FLAGS, "--replicates=20", f"--json={tmp_path}/a.json"])
    assert loaded == ["full", "a", "b"]
    (found,) = json.loads((tmp_path / "a.json").read_text())["sets"]
    (row,) = found["rows"]
    assert found["trials"] and found["utterances"] == 16
    assert row["eer"] - row["float_eer"] == pytest.approx(row["eer_change"])
    assert row["eer"] - found["full_eer"] == pytest.approx(row["full_eer_change"])
    each = np.arange(16)
    assert cosine_scores(made["a"], made["b"], each, each).mean() == pytest.approx(row["cosine"], abs=1e-5)
    assert f"{row['eer']:.2f}" in activations_table({"sets": [found]})
    assert "W4A8" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--pair=W4A8", "--pair=a,b", f"--data={DATA}"])
def test_mistakes(flag):
    with pytest.raises(UserError, match="must be"):
        bench.run("activations", [*FLAGS, flag])
