"""The flags that name a cascade's levels."""

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.levels import parse_levels


@pytest.mark.parametrize("bits", ["1" * 5000, "65", "0", "²", ""], ids=["long", "65", "0", "square", "none"])
def test_bits_that_are_none_are_one_short_line(bits):
    with pytest.raises(UserError, match=r"^`?-*stage.* must be BITS:EMBEDDINGS.npz, with 1 to 64 bits") as error:
        parse_levels([f"{bits}:e.npz"])
    assert len(str(error.value)) < 400
