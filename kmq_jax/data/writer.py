"""Writing a prepared dataset in parallel, so that a run that is killed goes on where it stopped.

While a dataset is being made, its shards lie in `.prepare/`. A shard is complete once a JSON beside it says what it
holds. Which utterances a shard holds depends on the source alone. So the result is the same however often the run
was interrupted, and with any number of workers.
"""

import csv
import dataclasses
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

from kmq_jax.core import locks
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write, read_json, read_object, sweep, write_json
from kmq_jax.core.locks import sole_writer
from kmq_jax.core.progress import progress
from kmq_jax.data import audio, prepared
from kmq_jax.data import beam as beams
from kmq_jax.data.table import Utterances

VERSION = "1.0.0"
SPLIT = "train"
_WORK = ".prepare"
_MOST_SHARDS = 256  # readers keep a file open for each
_LEAST_ROWS = 64  # utterances in a shard


def prepare(
    utterances: Utterances, out: Path, *, workers: int = 1, min_seconds: float = 0.5, beam: str | None = None
) -> Json:
    """Writes a dataset into the directory `out`, or finishes one that was interrupted.

    Args:
        utterances: what to write. What cannot be used is left out, with the reason in `rejected.csv`.
        out: the directory; its name becomes the dataset's.
        workers: processes that decode and write.
        min_seconds: shorter recordings are rejected.
        beam: options of an Apache Beam pipeline whose workers write the shards, in place of `workers`; all its machines
            must see the recordings and `out` under these names.

    Returns:
        The summary: `utterances`, `speakers`, `hours`, `rejected`, `source` (a fingerprint of the table and setting).

    Raises:
        UserError: `out` holds something else, the disk is full, or there is no recording, or none can be used.
    """
    if not len(utterances):
        raise UserError(f"--out={out}: there is no utterance to write")
    prepared.require_tfds()  # before the work
    with sole_writer(out, "out"):
        return _prepare(utterances, out, workers, min_seconds, beam)


def _prepare(utterances: Utterances, out: Path, workers: int, min_seconds: float, beam: str | None) -> Json:
    work = out / _WORK
    fingerprint = _fingerprint(utterances, min_seconds)
    if (out / "dataset_info.json").is_file():
        summary = read_object(out / "summary.json") if (out / "summary.json").is_file() else {}
        if summary.get("source") != fingerprint:
            raise UserError(f"--out={out} already holds another dataset; remove it or choose another directory")
        shutil.rmtree(work, ignore_errors=True)
        # Only names tell one dataset from another: recordings that were mended since are not in it.
        print(f"{out} was complete before; its recordings are not looked at again", file=sys.stderr)
        return summary
    plan = work / "plan.json"
    if plan.is_file():
        if read_json(plan) != {"source": fingerprint}:
            raise UserError(f"--out={out} holds an unfinished dataset of another source; remove it or choose another")
    elif out.is_dir() and {entry.name for entry in out.iterdir()} - {_WORK, "rejected.csv", locks.NAME}:
        raise UserError(f"--out={out} is not empty; choose another directory")
    # Before the first shard: from now on the directory is known to be this dataset's.
    sweep(out)
    sweep(work)
    write_json(plan, {"source": fingerprint})

    tasks = _split(utterances, work, min_seconds)
    todo = [task for task in tasks if not task.report.is_file()]
    if beam is None:
        _run(todo, workers, len(utterances))
    elif todo:
        beams.run(_write_shard, todo, beam)
        if missing := [task for task in todo if not task.report.is_file()]:
            raise UserError(
                f"--out={out}: {len(missing)} shards are not there; do all machines of Beam see this place?"
            )
    return _finish(utterances, out, tasks, fingerprint)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard, as a worker process gets it."""

    utterances: Utterances
    shard: Path
    min_seconds: float

    @property
    def report(self) -> Path:
        """The JSON that says what the shard holds; it is written when the shard is complete."""
        return self.shard.with_suffix(".json")


def _fingerprint(utterances: Utterances, min_seconds: float) -> str:
    about = f"{VERSION} {min_seconds} {utterances.root.absolute()}\n"
    digest = hashlib.sha256(about.encode(errors="surrogateescape"))
    for row in zip(utterances.ids, utterances.paths, utterances.speakers):
        digest.update("\t".join(row).encode(errors="surrogateescape") + b"\n")
    if utterances.spans is not None:
        digest.update(np.ascontiguousarray(utterances.spans).tobytes())
    return digest.hexdigest()


def _split(utterances: Utterances, work: Path, min_seconds: float) -> list[_Task]:
    # By the source alone, not by the workers: a resumed run must cut the same shards.
    rows = max(_LEAST_ROWS, -(-len(utterances) // _MOST_SHARDS))
    parts = [range(first, min(first + rows, len(utterances))) for first in range(0, len(utterances), rows)]
    return [_Task(utterances.select(p), work / f"{i:05d}.array_record", min_seconds) for i, p in enumerate(parts)]


_written: "Synchronized[int] | None" = None  # in a worker process: the count it shares with the others


def _start_worker(written: "Synchronized[int]") -> None:
    global _written
    _written = written
    parent = multiprocessing.parent_process()
    assert parent is not None

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process

    def follow() -> None:  # a killed parent must not leave its workers behind
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(tasks: list[_Task], workers: int, total: int) -> None:
    """Writes the shards of `tasks` in parallel, with a progress bar over utterances."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads is unsafe
    written = context.Value("q", total - sum(len(task.utterances) for task in tasks))
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (written,))
    try:
        futures = [pool.submit(_write_shard, task) for task in tasks]
        for _ in progress(_ticks(written, futures), total=total, desc="preparing", unit="utt"):
            pass
        for future in futures:
            future.result()
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); run again, with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ticks(written: "Synchronized[int]", futures: list[Future[None]]) -> Iterator[None]:
    """Yields once for every utterance the workers are done with, until all are, or one worker fails."""
    seen = 0
    under_way: set[Future[None]] = set(futures)
    while under_way:
        done, under_way = wait(under_way, timeout=0.2, return_when=FIRST_EXCEPTION)
        now = written.value  # read once: workers go on counting
        for _ in range(now - seen):
            yield
        seen = now
        if any(future.exception() for future in done):
            return


def _write_shard(task: _Task) -> None:
    """Writes one shard and, once that is safe on disk, its report."""
    from array_record.python import array_record_module

    features = prepared.features()
    rows, rejected, size = [], [], 0
    table = task.utterances
    with atomic_write(task.shard) as temporary:
        # One record a group: random access then reads no neighbours. Uncompressed: samples of 16 bits shrink little,
        # and unpacking them would be time that training waits for.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for i in range(len(table)):
                try:
                    wave = audio.to_int16(table.load(i, min_seconds=task.min_seconds))
                    row = {"id": table.ids[i], "path": table.paths[i], "speaker": table.speakers[i]}
                    "".join(row.values()).encode()  # records hold text in UTF-8
                    record = prepared.serialize(features, {"audio": wave, **row})
                except audio.AudioError as error:
                    rejected.append((table.paths[i], error.reason))
                except UnicodeEncodeError:
                    rejected.append((table.paths[i], "its name is not UTF-8"))
                except Exception as error:  # whatever one file provokes in a decoder must not stop the run
                    rejected.append((table.paths[i], f"unreadable ({type(error).__name__}: {error})"))
                else:
                    writer.write(record)
                    rows.append(row | {"samples": len(wave)})
                    size += len(record)
                _count_one()
            writer.close()
            _check_shard(temporary, len(rows))
        except RuntimeError as error:
            raise UserError(f"cannot write {task.shard}: {_plain(error)}") from None
    write_json(task.report, {"rows": rows, "rejected": rejected, "bytes": size})


def _count_one() -> None:
    """Tells the parent process, where there is one, that another utterance is done."""
    if _written is not None:
        with _written.get_lock():
            _written.value += 1


def _check_shard(path: Path, records: int) -> None:
    """Raises where a shard does not read back: a full disk does not always show while writing."""
    from array_record.python import array_record_module

    if records:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
        if found != records:
            raise RuntimeError(f"only {found} of {records} records arrived (disk full?)")


def _plain(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _finish(utterances: Utterances, out: Path, tasks: list[_Task], fingerprint: str) -> Json:
    """Assembles the dataset beside the shards, then moves it into place, `dataset_info.json` last."""
    staged, assembled = out / _WORK / "finished", out / _WORK / "assembled.json"
    if not assembled.is_file():
        _assemble(utterances, out, tasks, staged, fingerprint)
        write_json(assembled, True)
    last = staged / "dataset_info.json"
    # `dataset_info.json` comes last: a directory that has it is complete.
    for path in [*(path for path in sorted(staged.iterdir()) if path != last), last]:
        os.replace(path, out / path.name)
    shutil.rmtree(out / _WORK)
    return read_json(out / "summary.json")


def _assemble(utterances: Utterances, out: Path, tasks: list[_Task], staged: Path, fingerprint: str) -> None:
    """Gives the shards their names and writes what describes them."""
    tfds = prepared.require_tfds()
    staged.mkdir(exist_ok=True)
    reports = [read_json(task.report) for task in tasks]
    rejected = [row for report in reports for row in report["rejected"]]
    rows = [row for report in reports for row in report["rows"]]
    with (
        atomic_write(out / "rejected.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *rejected])
    if not rows:
        shutil.rmtree(out / _WORK)  # so that it can be tried again
        raise UserError(f"no recording could be used; {out / 'rejected.csv'} says why ({rejected[0][1]}, ...)")
    for row in rows:
        row["gender"] = utterances.genders.get(row["speaker"], "")
        row["age"] = utterances.ages.get(row["speaker"], "")
    prepared.write_listing(staged / f"utterances-{SPLIT}.csv", rows)

    template = tfds.core.ShardedFileTemplate(
        data_dir=staged, dataset_name=_dataset_name(out), split=SPLIT, filetype_suffix="array_record"
    )
    filled = [(task.shard, report) for task, report in zip(tasks, reports) if report["rows"]]
    for i, (shard, _) in enumerate(filled):
        if shard.is_file():  # else an earlier run, which was stopped, has moved it
            os.replace(shard, template.sharded_filepath(shard_index=i, num_shards=len(filled)))
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[len(report["rows"]) for _, report in filled],
        num_bytes=sum(report["bytes"] for _, report in filled),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=staged,
        features=prepared.features(),
        split_infos=[split],
        version=VERSION,
        filename_template=template,
        check_data=False,
    )
    summary = {
        "utterances": len(rows),
        "speakers": len({row["speaker"] for row in rows}),
        "hours": round(sum(row["samples"] for row in rows) / audio.SAMPLE_RATE / 3600, 4),
        "rejected": len(rejected),
        "source": fingerprint,
    }
    write_json(staged / "summary.json", summary)


def _dataset_name(out: Path) -> str:
    """A name tfds allows: small letters, digits and underscores, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "_", out.absolute().name.lower()).strip("_")
    return name if name[:1].isalpha() else f"speech_{name}".rstrip("_")
