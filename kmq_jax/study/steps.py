"""A long job in steps, each of which is done once, and again when what it depends on has changed.

A step depends on its settings, on the steps before it, on the data it reads, and on the code. For the code stand the
package's version and the step's own recipe number. A hash of the sources would be surer, but would repeat hours of
training for a changed comment. So a change of what a step computes must raise its recipe number, in `RECIPES` of the
study's pipeline.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import kmq_jax
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_object, write_json
from kmq_jax.core.locks import in_turn

_LISTS = ("wav.scp", "dataset_info.json")
"""A directory with one of these is described by the files that lie in it; what they name is not looked at."""
_SHORT = 1 << 26  # bytes of a file that is read whole


class Steps:
    """The steps of a job, remembered in `steps.json` of its directory.

    A step that another process is doing is waited for, and then found done.
    """

    def __init__(self, directory: Path):
        """Opens (and makes) the directory. Other processes may do other steps in it at the same time."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "steps.json"
        self._known()
        self._stamp = functools.cache(stamp)  # data is looked at once a run

    def run(
        self,
        name: str,
        settings: object,
        needs: Sequence[str],
        output: str,
        action: Callable[[Path], object],
        *,
        data: Sequence[str] = (),
        recipe: int = 1,
    ) -> Path:
        """Does a step, unless it has been done with all that it depends on as it is now.

        A step that was interrupted finds what it had written and may go on from there; one that was done or begun
        with anything else has its output removed first.

        Args:
            name: of the step.
            settings: what the step depends on, as JSON values.
            needs: names of the steps whose outputs it reads, run before.
            output: the file or directory it writes, below the job's directory.
            action: is given the output's path.
            data: DATA and TRIALS that it reads, as the user names them.
            recipe: number of the code's version of this step.

        Returns:
            The output's path.
        """
        with in_turn(self.directory / f".{name}.lock", f"{name}: waits for another process that is at it"):
            return self._run(name, settings, needs, self.directory / output, action, data, recipe)

    def _run(
        self,
        name: str,
        settings: object,
        needs: Sequence[str],
        path: Path,
        action: Callable[[Path], object],
        data: Sequence[str],
        recipe: int,
    ) -> Path:
        done = self._known()
        for other in needs:
            if other not in done:
                raise UserError(f"{self.directory}: {name} needs {other}, which was not made yet")
        # Digests of the steps before: a change travels down to all that depends on it.
        before = [done[other]["digest"] for other in needs]
        read = [self._stamp(place) for place in data]
        about = [kmq_jax.__version__, recipe, settings, read, before]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        known = done.get(name, {})
        if known == {"digest": digest, "done": True} and path.exists():
            print(f"{name}: done before", file=sys.stderr)
            return path
        if known.get("digest") != digest and path.exists():
            # Made with other settings: to go on from it would mix the two.
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Noted before the work: what is found after an interruption is then known to be of these settings.
        self._remember(name, digest, False)
        print(f"{name}: begins", file=sys.stderr)
        start = time.monotonic()
        action(path)
        print(f"{name}: took {time.monotonic() - start:.1f} s", file=sys.stderr)
        self._remember(name, digest, True)
        return path

    def _known(self) -> dict[str, Json]:
        """Digest of each step, and whether it is done."""
        known: dict[str, Json] = read_object(self._file) if self._file.exists() else {}
        if not all(isinstance(one, dict) for one in known.values()):
            raise UserError(f"{self._file} does not tell what was done: remove it, and all steps are done again")
        return known

    def _remember(self, name: str, digest: str, done: bool) -> None:
        with in_turn(self.directory / ".steps.lock"):
            write_json(self._file, {**self._known(), name: {"digest": digest, "done": done}})


def stamp(data: str) -> str:
    """A text that changes when the data changes: a hash of lists' contents, or of names, sizes and times of recordings.

    Args:
        data: DATA or TRIALS; several DATA are separated by commas. `synthetic:SPLIT` is its own stamp, and so is what
            does not exist.

    >>> stamp("synthetic:dev?speakers=6")
    'synthetic:dev?speakers=6'
    """
    if "," in data and not os.path.exists(data):
        return ",".join(stamp(part.strip()) for part in data.split(","))
    path = Path(data)
    if data.startswith("synthetic:") or not data or not path.exists():
        return data
    if path.is_file():
        lines = [_of_file(path)]
    elif any((path / name).is_file() for name in _LISTS):
        lines = [f"{one.name} {_of_file(one)}" for one in sorted(path.iterdir()) if one.is_file()]
    else:
        lines = [f"{one.relative_to(path)} {_size_and_time(one)}" for one in sorted(path.rglob("*")) if one.is_file()]
    return f"{data} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def _of_file(path: Path) -> str:
    """The hash of a list's content; size and time of what is too long to be one."""
    if path.stat().st_size > _SHORT:
        return _size_and_time(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size_and_time(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
