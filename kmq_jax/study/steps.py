"""A long job in steps, each of which is done once, and again when what it depends on has changed."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kmq_jax.core.files import read_json, write_json


class Steps:
    """The steps of a job, remembered in `steps.json` of its directory."""

    def __init__(self, directory: Path):
        """Opens (and makes) the directory."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "steps.json"
        self._known: dict[str, dict[str, Any]] = read_json(self._file) if self._file.exists() else {}

    def run(self, name: str, settings: Any, needs: Sequence[str], output: str, action: Callable[[Path], None]) -> Path:
        """Does a step, unless it has been done with the same settings and the same steps before it.

        A step that was interrupted finds what it had written and may go on from there; one that was done or begun
        with other settings has its output removed first.

        Args:
            name: of the step.
            settings: what the step depends on, as JSON values.
            needs: names of the steps whose outputs it reads, run before.
            output: the file or directory it writes, below the job's directory.
            action: is given the output's path.

        Returns:
            The output's path.
        """
        path = self.directory / output
        before = [self._known[other]["digest"] for other in needs]
        digest = hashlib.sha256(json.dumps([settings, before], sort_keys=True).encode()).hexdigest()[:16]
        known = self._known.get(name, {})
        if known == {"digest": digest, "done": True} and path.exists():
            print(f"{name}: done before", file=sys.stderr)
            return path
        if known.get("digest") != digest and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._remember(name, digest, False)
        print(f"{name}: begins", file=sys.stderr)
        start = time.monotonic()
        action(path)
        print(f"{name}: took {time.monotonic() - start:.1f} s", file=sys.stderr)
        self._remember(name, digest, True)
        return path

    def _remember(self, name: str, digest: str, done: bool) -> None:
        self._known[name] = {"digest": digest, "done": done}
        write_json(self._file, self._known)
