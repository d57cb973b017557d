"""Packages that are missing, and packages that are there but do not load."""

import sys

import pytest

from kmq_jax.core.errors import UserError, needed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('raise ImportError("libcuda.so.1: no such file")', "which cannot be imported: libcuda.so.1: no such file"),
        ("import no_such_thing", "which cannot be imported: No module named 'no_such_thing'"),
        ("import broken.absent", "pip install broken"),
    ],
)
def test_a_package_that_is_there_is_not_called_missing(text, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError, match=f"^training needs the package broken(, |: ){message}$"):
        needed("broken", "training")
