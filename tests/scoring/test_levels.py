"""The flags that name a cascade's levels, and their files."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.levels import parse_levels, read_levels
from kmq_jax.scoring.table import write_embeddings


@pytest.mark.parametrize("bits", ["1" * 5000, "65", "0", "²", ""], ids=["long", "65", "0", "square", "none"])
def test_bits_that_are_none_are_one_short_line(bits):
    with pytest.raises(UserError, match=r"^`?-*stage.* must be BITS:EMBEDDINGS.npz, with 1 to 64 bits") as error:
        parse_levels([f"{bits}:e.npz"])
    assert len(str(error.value)) < 400


def test_levels_of_whole_recordings_and_a_reference_of_speech_alone_are_told(tmp_path, capsys):
    for bits, vad in ((2, False), (4, False), (32, True)):
        write_embeddings(tmp_path / f"{bits}.npz", ["a"], ["a.wav"], ["x"], np.ones((1, 2), np.float32), "m", vad)
    levels = [(bits, str(tmp_path / f"{bits}.npz")) for bits in (2, 4)]
    read_levels(levels, None)
    assert capsys.readouterr().err == ""
    read_levels(levels, str(tmp_path / "32.npz"))
    assert "32.npz was embedded with vad" in capsys.readouterr().err
