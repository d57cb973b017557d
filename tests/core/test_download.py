"""Downloads whose connection breaks off; `tests/data/test_layouts.py` has those from a server."""

import hashlib
import io

import pytest

from kmq_jax.core import download
from kmq_jax.core.errors import UserError

ADDRESS = "http://host/a"


class Answer(io.BytesIO):
    """An answer that breaks off after ten bytes, by an error or by its end."""

    def __init__(self, error):
        super().__init__(b"0123456789")
        self.error, self.headers = error, {"Content-Length": "100"}

    def read(self, *size):
        got = super().read(*size)
        if not got and self.error:
            raise self.error
        return got


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "it broke off after 10 of 100 bytes"), (TimeoutError("timed out"), "timed out")],
)
def test_a_connection_that_breaks_off_is_told_with_its_address(error, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda address, timeout: Answer(error))
    with pytest.raises(UserError, match=f"^cannot download {ADDRESS}: {reason}$"):
        download.download(ADDRESS, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_published_hash_may_be_in_capitals(tmp_path):
    (tmp_path / "a").write_text("abc")
    download.check_md5(tmp_path / "a", hashlib.md5(b"abc").hexdigest().upper())
