"""The benchmark of biases: figures of every list have a place."""

import pytest

from kmq_jax.benchmarks.options import BiasesBench
from kmq_jax.core.errors import UserError


def test_data_is_not_given_twice():
    """Figures of the second list used to take the place of those of the first."""
    given = {"model": "m", "trials": ("O", "E")}
    assert BiasesBench(**given, data=("vox1", "so762")).data == ("vox1", "so762")
    with pytest.raises(UserError, match=r"`data` \(=vox1\) is given twice"):
        BiasesBench(**given, data=("vox1", "vox1"))
