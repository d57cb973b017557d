"""The front end's benchmark on a few short files."""

import json

import numpy as np
import pytest
import soundfile

from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError


@pytest.fixture
def run(tmp_path):
    """Runs with flags, on a folder of two speakers with one second of noise each."""
    rng = np.random.default_rng(0)
    for speaker in ("a", "b"):
        (tmp_path / "audio" / speaker).mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / speaker / "x.wav", 0.1 * rng.standard_normal(16000), 16000)

    return lambda *flags: bench.run("frontend", [f"--data={tmp_path / 'audio'}", *flags])


def test_figures_of_both_presets(run, tmp_path, capsys):
    run("--repeats=1", "--batch=3", f"--json={tmp_path / 'out.json'}")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["utterances"] == 2
    assert set(result["presets"]) == {"kiwano", "wespeaker"}
    for figures in result["presets"].values():
        assert 0 < figures["max_difference"] < 1e-2
        assert figures["mean_difference"] < 1e-4
        assert figures["speedup"] > 0
    assert result["batch_16x2s"]["augment_batch_seconds"] > 0
    assert "times kaldi-native-fbank" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--utterances=0", "--batch=0", "--repeats=-1"])
def test_wrong_flags_are_named(run, flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        run(flag)
