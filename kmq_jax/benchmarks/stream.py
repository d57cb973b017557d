"""Trial lists of any length through `score --stream` and `cascade --stream`: seconds and peak memory of the commands.

A list is made on disk, and what the commands read: embeddings at 2, 3, 4 bits and of a reference, a cohort, a policy.
Then each command runs as a user would start it, in one process and in several that share the list. `snorm` is `score`
with the cohort.
"""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kmq_jax.benchmarks.options import StreamBench
from kmq_jax.benchmarks.timing import Figures, processors
from kmq_jax.cascade.policy import CascadePolicy, fit_map, symmetric_gates
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.core.progress import progress
from kmq_jax.scoring.cosine import cosine_scores

_LINES = 1 << 20  # lines made at a time
_SEEN = 200_000  # trials that the policy is made on
_NOISE = {2: 0.6, 3: 0.35, 4: 0.2}  # what bits do to embeddings, as a share of utterances' spread
_REFERENCE = 32
_GATES = (0.08, 0.04)  # half widths about the threshold, of the first and the second level


def make_list(path: Path, trials: int, ids: np.ndarray, speakers: int) -> None:
    """Writes `label enrol test` lines of random trials, half of them targets.

    Args:
        path: the file.
        trials: how many.
        ids: `[utterances, letters]` uint8, names of equal length; the i-th is of speaker `i % speakers`.
        speakers: how many.
    """
    rng, (utterances, letters) = np.random.default_rng(1), ids.shape
    per_speaker = utterances // speakers
    with path.open("wb") as file:
        for start in progress(range(0, trials, _LINES), desc="writing the list", unit="part"):
            count = min(_LINES, trials - start)
            enrol = rng.integers(per_speaker * speakers, size=count)
            other = rng.integers(per_speaker * speakers, size=count)
            same = other - other % speakers + enrol % speakers
            test = np.where(np.arange(start, start + count) % 2 == 0, same, other)
            # Columns of a line: label, space, enrol, space, test, line feed.
            lines = np.full((count, 2 * letters + 4), ord(" "), np.uint8)
            lines[:, 0] = ord("0") + (enrol % speakers == test % speakers)
            lines[:, 2 : 2 + letters], lines[:, 3 + letters : -1] = ids[enrol], ids[test]
            lines[:, -1] = ord("\n")
            lines.tofile(file)


def make(place: Path, options: StreamBench) -> None:
    """Writes the list, the embedding files, a cohort and a policy into `place`."""
    rng = np.random.default_rng(0)
    utterances, speakers = options.utterances, options.speakers
    speaker = np.arange(utterances) % speakers
    width = len(str(utterances)), len(str(speakers))  # of padded numbers: names must be of equal length
    names = [f"id{s:0{width[1]}d}-{u:0{width[0]}d}" for u, s in enumerate(speaker.tolist())]
    ids = np.array(names, "S").view(np.uint8).reshape(utterances, -1)
    make_list(place / "trials.txt", options.trials, ids, speakers)
    size = (utterances, options.dim)
    reference = rng.standard_normal((speakers, options.dim), np.float32)[speaker]
    reference += options.spread * rng.standard_normal(size, np.float32)
    members, cohort = [f"cohort{i}" for i in range(options.cohort)], (options.cohort, options.dim)
    others = rng.standard_normal(cohort, np.float32) + options.spread * rng.standard_normal(cohort, np.float32)
    np.savez(place / "cohort.npz", ids=np.array(members), embeddings=others)
    enrol, test = rng.integers(utterances, size=(2, min(_SEEN, options.trials)))
    test[::2] = (test - test % speakers + enrol % speakers)[::2] % utterances
    own, labels = cosine_scores(reference, reference, enrol, test), speaker[enrol] == speaker[test]
    threshold, maps = float(np.quantile(own[~labels], 0.95)), []
    for bits, noise in (*_NOISE.items(), (_REFERENCE, 0.0)):
        rows = reference
        if noise:
            rows = reference + noise * options.spread * rng.standard_normal(size, np.float32)
            maps.append(fit_map("isotonic", cosine_scores(rows, rows, enrol, test), own, labels))
        np.savez(place / f"e{bits}.npz", ids=np.array(names), embeddings=rows)
    CascadePolicy(tuple(_NOISE), tuple(maps), symmetric_gates(threshold, _GATES), threshold).save(place / "policy.json")


def words_of(command: str, place: Path) -> list[str]:
    """A command's own name, and what it is given."""
    if command != "cascade":
        cohort = [f"--snorm_cohort={place / 'cohort.npz'}"] if command == "snorm" else []
        return ["score", f"--embeddings={place / f'e{_REFERENCE}.npz'}", *cohort]
    levels = [f"--stage={bits}:{place / f'e{bits}.npz'}" for bits in _NOISE]
    return ["cascade", f"--policy={place / 'policy.json'}", *levels, f"--reference={place / f'e{_REFERENCE}.npz'}"]


def timed(command: str, place: Path, processes: int) -> tuple[Figures, Figures]:
    """Runs a command; returns its cost and its figures.

    The cost is its seconds from start to end, and the peak memory of its largest process, in MB.

    Raises:
        UserError: it failed.
    """
    out = place / f"{command}-{processes}.json"
    words = [sys.executable, "-m", "kmq_jax", *words_of(command, place), "--stream"]
    words += [f"--trials={place / 'trials.txt'}", f"--json={out}"]
    shared = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    each = [{"JAX_PROCESS_ID": str(i)} if processes > 1 else {} for i in range(processes)]
    start, peaks = time.perf_counter(), []
    with (place / "said.txt").open("w+b") as said:
        started = [subprocess.Popen(words, env={**shared, **own}, stdout=said, stderr=said) for own in each]
        try:
            for process in started:
                # `wait4` tells this child's memory; `getrusage` the largest of all children so far.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peaks.append(_megabytes(usage))
        finally:
            for process in started:
                if process.returncode is None:
                    process.kill()
                    process.wait()
        if any(process.returncode for process in started):
            said.seek(0)
            last = (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{command} failed: {last}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_memory_mb": max(peaks)}, json.loads(out.read_text())


def _megabytes(usage: resource.struct_rusage) -> float:
    # macOS counts it in bytes, Linux in KiB.
    return round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextlib.contextmanager
def _place(directory: Path | None) -> Iterator[Path]:
    """A temporary directory, within another one where that is given."""
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as made:
        yield Path(made)


def differences(one: Figures, other: Figures) -> list[str]:
    """The names of figures that differ. `cllr` is left out: several processes add its terms in another order.

    >>> differences({"eer": 1.0, "cllr": 0.2}, {"eer": 1.5, "cllr": 0.3})
    ['eer']
    """
    return [name for name in one if one[name] != other.get(name) and name != "cllr"]


def measure(place: Path, options: StreamBench) -> list[Figures]:
    """Runs every command with one process, and with several; a row for each."""
    rows: list[Figures] = []
    for command in options.commands:
        figures: dict[int, Figures] = {}
        for processes in sorted({1, options.processes}):
            row, figures[processes] = timed(command, place, processes)
            found = {name: figures[processes][name] for name in ("trials", "targets", "eer", "eer_bounds")}
            apart = differences(figures[1], figures[processes])
            rows.append({"command": command, "processes": processes, **row, **found, "unlike_one_process": apart})
            print(
                f"{command:8}{processes} process{'es' if processes > 1 else '  '}{row['seconds']:10.1f} s"
                f"{row['peak_memory_mb']:10.0f} MB   EER {found['eer']:.4f} %"
                + (f"   DIFFERS: {', '.join(apart)}" if apart else ""),
                flush=True,
            )
    return rows


def main(options: StreamBench) -> None:
    """Runs the benchmark."""
    with _place(options.directory) as place:
        make(place, options)
        size = (place / "trials.txt").stat().st_size
        print(f"{options.trials:,} trials in {size / 1e9:.2f} GB, {options.utterances:,} utterances x {options.dim}")
        rows = measure(place, options)
    if options.json:
        about = {name: getattr(options, name) for name in ("trials", "utterances", "speakers", "dim", "cohort")}
        write_json(options.json, {**about, "cores": processors(), "list_bytes": size, "rows": rows})
