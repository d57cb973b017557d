"""Checkpoints of a run. The only module that imports orbax."""

import errno
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.tree import Params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports deprecate one another
    from orbax.checkpoint import v1 as ocp


FULL = os.strerror(errno.ENOSPC)  # how the system words a full disk


class _Newest:
    """Keeps the newest few of the checkpoints that are due, and the newest of all, from which a run goes on."""

    def __init__(self, keep: int, due: Callable[[int], bool]):
        self._keep, self._due = keep, due

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Called by orbax after each save, with all checkpoints in ascending order."""
        steps = [found.step for found in checkpoints]
        kept = {*[step for step in steps if self._due(step)][-self._keep :], *steps[-1:]}
        return [step in kept for step in steps]


class Checkpoints:
    """The numbered checkpoints below one directory, the newest few of them kept.

    A checkpoint gets its final name only when it is complete, so every one that is listed can be restored.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 1,
        *,
        writes: bool = False,
        due: Callable[[int], bool] = lambda step: True,
    ):
        """Opens `directory`.

        Args:
            directory: of the checkpoints.
            keep: how many of the newest a writer keeps.
            writes: whether checkpoints are saved. One process alone may do so (`core.locks`): it makes the directory,
                and removes what a killed run left half written. Readers change nothing.
            due: whether a step's checkpoint is one of the schedule, of which `keep` count. One that is saved besides,
                because the run is stopped, goes as soon as a later one is saved.
        """
        self.directory = Path(directory).resolve()
        self._writer, self._due = None, due
        if writes:
            if jax.process_index() == 0:
                for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(left, ignore_errors=True)
            try:
                self._writer = ocp.training.Checkpointer(
                    self.directory,
                    preservation_policy=_Newest(keep, due),
                    cleanup_tmp_directories=True,
                )
            except Exception as error:  # no permission, a full disk
                raise UserError(f"cannot open {self.directory}: {_reason(error)}") from error
        # A run goes on from the newest checkpoint, and may be asked to save that step again.
        self._known = set(self.steps()[-1:])

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending.

        Raises:
            UserError: the directory cannot be read. One that does not exist holds no steps.
        """
        if self._writer is not None:
            return sorted(found.step for found in self._writer.checkpoints)
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.directory) if entry.name.isdecimal())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.directory}: {error.strerror}") from error

    def due_steps(self) -> list[int]:
        """The steps of `steps()` that are of the schedule: the same whether or not the run was stopped on its way."""
        return [step for step in self.steps() if self._due(step)]

    def save(self, step: int, **parts: object) -> None:
        """Saves named parts as checkpoint `step`: trees of arrays, or grain iterators, whose position is saved.

        A step that this run has saved already, or has resumed at, is not saved again.

        Raises:
            UserError: it cannot be written (full disk, no permission), or another run wrote it; earlier checkpoints
                stay.
        """
        assert self._writer is not None, "these checkpoints were opened to be read"
        if step in self._known:
            return
        if step in self.steps():
            raise UserError(
                f"{self.directory} has a checkpoint {step} that this run did not write: is another at work?"
            )
        try:
            saved = self._writer.save_checkpointables(step, parts)
        except Exception as error:  # orbax wraps a full disk in errors of its own, by layer
            raise UserError(f"cannot save checkpoint {step} to {self.directory}: {_reason(error)}") from error
        if not saved:
            raise UserError(f"checkpoint {step} was not saved to {self.directory}")
        self._known.add(step)

    def restore(self, step: int, **parts: object) -> dict[str, Params]:
        """Restores parts of checkpoint `step`.

        Args:
            step: one of `steps()`.
            **parts: for a tree its `jax.ShapeDtypeStruct`s with shardings; for a grain iterator one made as the saved
                one was, which is moved to the saved position in place.

        Returns:
            The parts by name.

        Raises:
            UserError: the checkpoint is damaged or its structure differs.
        """
        try:
            return ocp.load_checkpointables(self.directory / str(step), parts)
        except Exception as error:
            raise UserError(f"cannot restore {self.directory}/{step}: {_reason(error)}") from error

    def load(self, step: int, part: str) -> Params:
        """Loads one tree of checkpoint `step` as nested dictionaries of numpy arrays, wherever it was saved.

        Raises:
            UserError: the checkpoint is damaged or lacks the part.
        """
        # The shardings it was saved with name devices that this machine may lack.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            saved = ocp.metadata(self.directory / str(step), part).metadata
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
        except Exception as error:
            raise UserError(f"cannot read {part} of {self.directory}/{step}: {_reason(error)}") from error
        return jax.device_get(self.restore(step, **{part: shapes})[part])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for writes under way, then releases the directory."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:  # a write under way failed
            raise UserError(f"cannot write to {self.directory}: {_reason(error)}") from error


class _TellOnce(logging.Filter):
    """Drops the pages that threads of orbax log about a failed write: `Checkpoints` raises it, in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_TellOnce())


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook as it was, but silent on writes that still run after their failure was told: tensorstore prints them."""
    if not _late(error):
        _told_before(kind, error, trace)


def _tell_ignored(ignored: "sys.UnraisableHookArgs") -> None:
    """As `_tell`, for what nobody can catch: tensorstore's threads hand over some of these errors so."""
    if not _late(ignored.exc_value):
        _ignored_before(ignored)


def _late(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and str(error) == "Event loop is closed"


_told_before, sys.excepthook = sys.excepthook, _tell
_ignored_before, sys.unraisablehook = sys.unraisablehook, _tell_ignored


def _reason(error: BaseException) -> str:
    return FULL if FULL in str(error) else first_line(error)  # tensorstore wraps it in pages
