"""What a result was made with: the revision of the source, the versions of Python and of the libraries."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from kmq_jax.core.files import Json

LIBRARIES = ("kmq_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SOURCE = Path(__file__).resolve()


def provenance() -> Json:
    """Returns `revision`, `dirty`, `python` and the version of each of `LIBRARIES`; null is what cannot be known."""
    revision, dirty = revision_of(SOURCE)
    if revision is None:
        revision = _installed_revision()
    return {
        "revision": revision,
        "dirty": dirty,
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def revision_of(file: Path) -> tuple[str | None, bool | None]:
    """The git revision that a source file belongs to, and whether tracked files were changed since.

    Both are None where there is no git, or where the file merely lies in a checkout of something else, as an installed
    package does in a project's virtual environment.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _installed_revision() -> str | None:
    """The revision of a package that pip installed from a repository's address."""
    try:
        origin = json.loads(importlib.metadata.distribution("kmq_jax").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    revision: str | None = origin.get("vcs_info", {}).get("commit_id")
    return revision


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
