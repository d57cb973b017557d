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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import kmq_jax
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, file_hash, read_json, read_object, size_and_time, write_json
from kmq_jax.core.locks import in_turn
from kmq_jax.core.memory import peak_device_mb, peak_memory_mb
from kmq_jax.core.provenance import start
from kmq_jax.data.folder import walk

_LISTS = ("wav.scp", "dataset_info.json")
"""A directory with one of these is stamped by the files directly in it; recordings that they name are not looked at."""
_COSTS = ("seconds", "memory_mb", "device_mb")
_SHORT = 1 << 26  # bytes: the largest file that is hashed whole in any case
_READ = 1 << 31  # bytes: files that together are no larger are all hashed whole


@dataclass(frozen=True)
class Work:
    """A step of a plan.

    Attributes:
        kind: the first word of the step's name; steps of one kind take alike.
        amount: how much of it there is, such as epochs of training.
        name: of the step; empty where it is not known yet.
    """

    kind: str
    amount: float = 1.0
    name: str = ""


class Steps:
    """The steps of a job, remembered in `steps.json` of its directory, with what each took.

    A step that another process is doing is waited for, and then found done. `starts.json` holds, for every process
    that did any, its command line and what it ran with.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[Work] = (),
        left: Callable[[Collection[int], dict[str, Json]], float | None] = lambda behind, done: None,
    ):
        """Opens (and makes) the directory. Other processes may do other steps in it at the same time.

        Args:
            directory: of the job.
            plan: all steps of the job, in order, as far as they are known.
            left: a function to the seconds that are left, or None, from the numbers of the plan's steps that are
                behind, and `seconds` and `amount` of the steps that are done, by kind.

        Raises:
            UserError: `steps.json` is none.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "steps.json"
        self._known()  # a damaged file is told before any work
        self._plan, self._left = plan, left
        self._met: list[str] = []  # steps of this process, in order
        self._amounts: dict[str, Work] = {}
        self._noted = False  # whether this process stands in `starts.json`
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

        Raises:
            UserError: a step that it needs was not made; and whatever `action` raises.
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
        again = name in self._met  # asked for twice in one run: it is told of once
        self._meet(name)
        done = self._known()
        for other in needs:
            if other not in done:
                raise UserError(f"{self.directory}: {name} needs {other}, which was not made yet")
        # Digests of the steps before: a change travels down to all that depends on it.
        before = [done[other]["digest"] for other in needs]
        read = [self._stamp(place) for place in data]
        known = done.get(name, {})
        # Relative places, so that the directory may be moved. Older studies have digests of the places as given.
        inside = self._inside(settings)
        digests = [_digest([kmq_jax.__version__, recipe, one, read, before]) for one in (inside, settings)]
        digest = known["digest"] if known.get("digest") in digests else digests[0]
        if known.get("digest") == digest and known["done"] and path.exists():
            if not again:
                self._say(name, "done before")
            return path
        of = {"version": kmq_jax.__version__, "recipe": str(recipe), "settings": _digest(inside)}
        of |= {f"data {place}": one for place, one in zip(data, read)}
        of |= {f"step {other}": one for other, one in zip(needs, before)}
        why = ""
        if known.get("digest") != digest and path.exists():
            # Made with other settings: to go on from it would mix the two.
            why = _changed(known.get("of", {}), of)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Noted before the work: what is found after an interruption is then known to be of these settings.
        self._remember(name, {"digest": digest, "of": of, "done": False})
        self._note_start()
        self._say(name, f"begins{why}{self._time_left()}")
        begun = time.monotonic()
        action(path)
        seconds = time.monotonic() - begun
        self._say(name, f"took {seconds:.1f} s")
        costs = dict(zip(_COSTS, (round(seconds, 2), peak_memory_mb(), peak_device_mb())))
        self._remember(name, {"digest": digest, "of": of, "done": True, **costs})
        return path

    def costs(self) -> dict[str, Json]:
        """What each step of this run took, in order: `seconds`, `memory_mb`, `device_mb`, as far as that is known."""
        known = self._known()
        return {name: {key: known[name].get(key) for key in _COSTS} for name in self._met}

    def _inside(self, settings: object) -> object:
        """Settings in which places below the directory are relative to it, whether given relative or absolute."""
        if isinstance(settings, dict):
            return {name: self._inside(value) for name, value in settings.items()}
        if isinstance(settings, (list, tuple)):
            return [self._inside(value) for value in settings]
        if isinstance(settings, str):
            for root in (self.directory, self.directory.absolute()):
                settings = settings.removeprefix(f"{root}{os.sep}")
        return settings

    def _meet(self, name: str) -> None:
        if name not in self._met:
            at = len(self._met)
            self._met.append(name)
            self._amounts[name] = self._plan[at] if at < len(self._plan) else Work(name.partition("-")[0])

    def _say(self, name: str, what: str) -> None:
        place = f"[{self._met.index(name) + 1}/{len(self._plan)}] " if self._plan else ""
        print(f"{place}{name}: {what}", file=sys.stderr, flush=True)

    def _time_left(self) -> str:
        """How long this step and all after it may take, by the steps done so far; empty where they do not tell."""
        done: dict[str, Json] = {}
        known = self._known()
        for name, step in known.items():
            if name in self._amounts and step.get("done") and "seconds" in step:
                work = self._amounts[name]
                sums = done.setdefault(work.kind, {"seconds": 0.0, "amount": 0.0})
                sums["seconds"] += step["seconds"]
                sums["amount"] += work.amount
        at = len(self._met) - 1
        # Jobs of their own, or an earlier run, may have done steps that stand further on.
        behind = {i for i, work in enumerate(self._plan) if i < at or i > at and self._holds(work.name, known)}
        seconds = self._left(behind, done)
        return "" if seconds is None else f", about {duration(seconds)} left"

    def _holds(self, name: str, known: Row) -> bool:
        """Whether a step is done with what it depends on, as far as that is known before it is its turn."""
        step = known.get(name, {})
        if name in self._met or not step.get("done"):
            return bool(step.get("done"))
        of = step.get("of", {})
        needs = {other.removeprefix("step "): digest for other, digest in of.items() if other.startswith("step ")}
        same = all(known.get(other, {}).get("digest") == digest for other, digest in needs.items())
        return same and of.get("version") == kmq_jax.__version__ and all(self._holds(other, known) for other in needs)

    def _note_start(self) -> None:
        """Adds this process to `starts.json`, once it does a step."""
        if not self._noted:
            with in_turn(self.directory / ".starts.lock"):  # others may add themselves at the same time
                path = self.directory / "starts.json"
                before = read_json(path) if path.exists() else []
                write_json(path, [*(before if isinstance(before, list) else ()), start()])
            self._noted = True

    def _known(self) -> dict[str, Json]:
        """Digest of each step, and whether it is done."""
        known: dict[str, Json] = read_object(self._file) if self._file.exists() else {}
        if not all(isinstance(one, dict) for one in known.values()):
            raise UserError(f"{self._file} does not tell what was done: remove it, and all steps are done again")
        return known

    def _remember(self, name: str, step: Json) -> None:
        # Read again under the lock: another process may have written since.
        with in_turn(self.directory / ".steps.lock"):
            write_json(self._file, {**self._known(), name: step})


def _digest(about: object) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _changed(before: dict[str, str], now: dict[str, str]) -> str:
    """What a step is done again for, as its line says it.

    >>> _changed({"version": "1", "settings": "a"}, {"version": "2", "settings": "a", "data voices": "b"})
    ' again (changed: version, data voices)'
    """
    names = [name for name, one in now.items() if before.get(name) != one] if before else []
    return f" again (changed: {', '.join(names)})" if names else " again"


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(0.42), duration(80), duration(100), duration(5000), duration(400000)
    ('0.4 s', '80 s', '2 min', '1.4 h', '4.6 days')
    """
    for unit, size, from_seconds, digits in (("days", 86400, 1.5e5, 1), ("h", 3600, 3600, 1), ("min", 60, 90, 0)):
        if seconds >= from_seconds:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def stamp(data: str) -> str:
    """A text that changes when the data changes, and stays when the same data is copied or fetched again.

    It holds a hash of names and contents. Of files that together have over 2 GiB, those over 64 MiB and recordings
    stand for their contents by size and time. Of a CSV, or a directory of Kaldi's lists, recordings are not looked at.

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
    lists = True
    if path.is_file():
        files = [path]
    elif any((path / name).is_file() for name in _LISTS):
        files = sorted(one for one in path.iterdir() if one.is_file())
    else:
        # Through links, as DATA is read.
        found = sorted(Path(directory, name) for directory, _, names in walk(path) for name in names)
        files, lists = [one for one in found if one.is_file()], False
    sizes = [one.stat().st_size for one in files]
    whole = [sum(sizes) <= _READ or (lists and size <= _SHORT) for size in sizes]
    lines = [
        f"{one.relative_to(path)} {file_hash(one) if read else size_and_time(one)}" for one, read in zip(files, whole)
    ]
    text = "\n".join(lines).encode(errors="surrogateescape")  # names of files may be any bytes
    return f"{data} {hashlib.sha256(text).hexdigest()[:16]}"
