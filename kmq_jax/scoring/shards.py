"""Embeds a list shard by shard, by any number of processes. A run that is killed goes on where it stopped.

The shards lie in `OUT.shards/` until the whole file is written. Beside them lies a plan with a digest of all that
decides what they hold: model, recordings with their lengths, sizes and times, options, devices. A shard that is there
is complete. Each is made under a lock of its own, which ends with its holder, and a process takes whichever shard is
free. Once none is missing, one process writes the whole file, with the bytes of a run in one piece. The plan stays, so
that a process that comes late finds that all is done.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import atomic_write, file_hash, read_object, sweep, write_json
from kmq_jax.core.locks import if_free, in_turn
from kmq_jax.core.npz import read_npz
from kmq_jax.data.table import Utterances
from kmq_jax.models.engine import chosen
from kmq_jax.scoring.archive import files_of
from kmq_jax.scoring.options import ExtractionOptions

EmbedShare = Callable[[tuple[int, int]], tuple[np.ndarray, np.ndarray]]
"""Embeds a share `(i, n)` of the list, as `models.speaker_model.embed_share`: gives rows, and `[rows, dim]`."""


def digest(utterances: Utterances, model: str, options: ExtractionOptions, shards: int) -> str:
    """A digest of all that decides which bits a shard holds: it tells one sharded run from another.

    Recordings count by the sizes and times of the files that they lie in, so that a file which was replaced shows.

    Args:
        utterances: the list; with `samples`, its lengths.
        model: the model's fingerprint.
        options: how recordings are embedded.
        shards: how many.

    Returns:
        SHA-256, in hexadecimal.
    """
    engine = chosen(options.engine, options.compute)
    # JAX rounds sums by the devices' kind, and batches are filled up to as many rows as there are devices.
    devices = [jax.default_backend(), jax.local_device_count()] if engine == "jax" else []
    about = [model, dataclasses.asdict(options) | {"engine": engine}, shards, devices, str(utterances.root.absolute())]
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for row in zip(utterances.ids, utterances.paths, utterances.speakers):
        found.update("\t".join(row).encode(errors="surrogateescape") + b"\n")
    for values in (utterances.spans, utterances.samples):
        found.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
    for seen in utterances.stamps():
        found.update(f"{seen}\n".encode())
    return found.hexdigest()


def run(
    out: Path, utterances: int, source: str, shards: int, embed: EmbedShare, write: Callable[[np.ndarray], None]
) -> bool:
    """Makes all shards, together with any other process of the same run, and writes the whole file.

    Args:
        out: the whole file.
        utterances: how many there are.
        source: the `digest` of this run.
        shards: how many.
        embed: makes a share's embeddings.
        write: writes the whole file, given `[utterances, dim]`.

    Returns:
        Whether this process wrote the file; if not, another process did, now or in an earlier run.

    Raises:
        UserError: `out` has shards of another run; a recording is at fault; or a file cannot be written.
    """
    work = _Work(out.with_name(f"{out.name}.shards"), out, source, shards)
    try:
        if not work.begin():
            return False
        while left := work.left():
            work.make(left, embed)
        with in_turn(work.place / ".assemble.lock"):
            if work.is_finished():  # another process was here first
                return False
            write(work.assembled(utterances))
            work.finish()
            return True
    except OSError as error:
        raise UserError(f"cannot write {work.place}: {reason_of(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Work:
    """The directory in which a run's shards are made."""

    place: Path
    out: Path
    source: str
    shards: int

    @property
    def plan(self) -> Path:
        """The file that says which run the shards are of, and whether it has finished."""
        return self.place / "plan.json"

    def file(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.place / f"{shard:05d}.npz"

    def begin(self) -> bool:
        """Makes or checks the plan; tells whether anything is left to do."""
        self.place.mkdir(parents=True, exist_ok=True)
        with in_turn(self.place / ".plan.lock"):
            if self.is_finished():
                self._clear()  # a run that was killed after its note leaves some
                return False
            # Without a plan whatever lies there is cleared, as after a finished run.
            known = read_object(self.plan) if self.plan.is_file() else {"finished": ""}
            if "finished" not in known and known.get("source") != self.source:
                raise UserError(
                    f"{self.place} holds shards of another run (other recordings, model, options or number of shards): "
                    "finish it, remove it, or choose another --out"
                )
            if "finished" in known:
                self._clear()  # a run that was killed while it cleared its shards leaves some
            sweep(self.place)
            write_json(self.plan, {"source": self.source})
        return True

    def is_finished(self) -> bool:
        """Whether the whole file is there, as this run wrote it."""
        if not self.plan.is_file() or not all(file.is_file() for file in files_of(self.out)):
            return False
        known = read_object(self.plan)
        return known.get("source") == self.source and known.get("finished") == self._written()

    def finish(self) -> None:
        """Notes that the whole file is there, and removes the shards."""
        # In this order: a run that is killed in between has no need of its shards. Under the lock of `begin`: another
        # run may begin as soon as this one has finished, and its shards must not be taken for ours.
        with in_turn(self.place / ".plan.lock"):
            write_json(self.plan, {"source": self.source, "finished": self._written()})
            self._clear()

    def _written(self) -> str:
        """What the plan keeps of the whole file, and of the archive that an index has beside it."""
        return "+".join(file_hash(file) for file in files_of(self.out))

    def _clear(self) -> None:
        for path in self.place.glob("*.npz"):
            path.unlink(missing_ok=True)

    def left(self) -> list[int]:
        """The numbers of the shards that are missing; none once another process has written the whole file.

        Raises:
            UserError: another run has begun in this directory.
        """
        known = read_object(self.plan)
        if known.get("source") != self.source:
            raise UserError(f"{self.place} was taken by another run")
        return [] if "finished" in known else [i for i in range(self.shards) if not self.file(i).is_file()]

    def make(self, left: list[int], embed: EmbedShare) -> None:
        """Makes every shard that no other process is making; where there is none, waits until one of them is done."""
        start, made = random.randrange(len(left)), False  # at random: processes seldom ask for the same lock
        for i in left[start:] + left[:start]:
            with if_free(self.place / f".{i:05d}.lock") as free:
                if free and i in self.left():  # looked up again: it may have been made since
                    rows, embeddings = embed((i, self.shards))
                    with atomic_write(self.file(i)) as temporary, temporary.open("wb") as file:
                        np.savez(file, rows=rows, embeddings=embeddings, source=np.array(self.source))
                    made = True
        if not made and (waited := [i for i in self.left() if i in left]):
            # Taking the lock waits for its holder; the caller then looks again at what is left.
            with in_turn(self.place / f".{waited[0]:05d}.lock", f"waiting for the other processes at {self.place}"):
                pass

    def assembled(self, utterances: int) -> np.ndarray:
        """All embeddings in the list's order.

        Raises:
            UserError: shards do not hold every utterance once; they are removed, so that a new run makes them again.
        """
        found, whole = np.zeros(utterances, np.int64), np.empty((utterances, 0), np.float32)
        for i in range(self.shards):
            rows, embeddings = self._read(i, utterances)
            if not whole.shape[1]:  # the dimension is known with the first shard
                whole = np.zeros((utterances, embeddings.shape[1]), np.float32)
            found[rows] += 1
            whole[rows] = embeddings
        if (found != 1).any():
            self._clear()
            raise UserError(f"{self.place}: its shards did not hold every utterance once; they are removed, run again")
        return whole

    def _read(self, shard: int, utterances: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and embeddings of a shard; one that does not belong here is removed and refused."""
        path = self.file(shard)
        part = read_npz(path, ("rows", "embeddings", "source"), what="a shard of embeddings")
        rows, embeddings = part["rows"], part["embeddings"]
        # Rows must ascend, so that the first and the last of them bound all.
        fits = rows.ndim == 1 and embeddings.ndim == 2 and len(rows) == len(embeddings)
        fits = fits and part["source"] == self.source and bool((np.diff(rows) > 0).all())
        if not fits or (rows.size and not 0 <= rows[0] <= rows[-1] < utterances):
            path.unlink(missing_ok=True)
            raise UserError(f"{path} was no shard of this list: it is removed, run again")
        return rows, embeddings
