"""The front end's benchmark on a few short files."""

import json

import numpy as np
import pytest
import soundfile

from kmq_jax.benchmarks import frontend
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError


@pytest.fixture
def arguments(tmp_path):
    """Parses flags, on a folder of two speakers with one second of noise each."""
    rng = np.random.default_rng(0)
    for speaker in ("a", "b"):
        (tmp_path / "audio" / speaker).mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / speaker / "x.wav", 0.1 * rng.standard_normal(16000), 16000)

    def parse(*flags):
        parser = command.parser("bench frontend", "", "")
        frontend.add_flags(parser)
        return parser.parse_args([f"--data={tmp_path / 'audio'}", *flags])

    return parse


def test_figures_of_both_presets(arguments, tmp_path, capsys):
    frontend.main(arguments("--repeats=1", "--batch=3", f"--json={tmp_path / 'out.json'}"))
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
def test_wrong_flags_are_named(arguments, flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        frontend.main(arguments(flag))
