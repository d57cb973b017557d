import pytest
import recordings

from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json


def test_the_benchmark_runs_and_writes_its_figures(tmp_path, capsys):
    source = f"--data={recordings.kaldi(tmp_path / 'k', 2, 4)}"
    common = [source, "--crop_seconds=0.5", f"--json={tmp_path / 'figures.json'}"]
    bench.run("data", [*common, "--batch=4"])
    figures = read_json(tmp_path / "figures.json")["examples_per_second"]
    assert set(figures) == {"first epoch", "plain loop", "later epochs"} and min(figures.values()) > 0
    assert "later epochs" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--batch \(=9\)"):
        bench.run("data", [*common, "--batch=9"])
