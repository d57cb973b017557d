"""The record of a run: one JSON object a line; beside it TensorBoard events and Weights & Biases, where wanted."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from kmq_jax.core.errors import UserError, needed, reason_of
from kmq_jax.core.files import Json, Row, atomic_write, require_regular


class RunLog:
    """Appends metrics to a JSONL file, each line with its `step`.

    A run that resumes from a checkpoint repeats the steps after it; the lines of those steps are dropped when the
    log is opened, so that each step stands in the file once. Only process 0 writes.

    Attributes:
        kept: the lines of earlier starts, up to the step at which the log was opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        step: int,
        events: str | os.PathLike[str] | None = None,
        project: str = "",
        settings: Row | None = None,
    ):
        """Opens the log of a run that stands at `step`.

        Args:
            path: of the JSONL file.
            step: the last step that is done.
            events: directory of TensorBoard event files; None for none.
            project: of Weights & Biases, which the log goes to as well; empty for none. The same file is the same run.
            settings: of the run, for Weights & Biases to show.

        Raises:
            UserError: the file cannot be written, or the package that writes events is missing.
        """
        self._path = Path(path)
        self._file = self._events = self._wandb = None
        self.kept: list[Json] = []
        # First, so that a missing package is told before the file is touched.
        if events is not None:
            event_writer = _event_writer()
        wandb = needed("wandb", "--wandb") if project else None
        if jax.process_index() != 0:
            return
        kept = [line for line in read_runlog(self._path) if line["step"] <= step] if self._path.exists() else []
        self.kept = kept
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        try:
            self._file = self._path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {reason_of(error)}") from error
        if events is not None:  # TensorBoard hides what an earlier start wrote from `purge_step` on
            self._events = event_writer(str(events), purge_step=step + 1, filename_suffix=f".{step}")
        if wandb is not None:
            # The file's place is the run's identity: a later start goes on in the same run.
            run = hashlib.sha256(str(self._path.resolve()).encode()).hexdigest()[:16]
            about = {"name": self._path.resolve().parent.name, "dir": str(self._path.parent), "config": settings}
            self._wandb = wandb.init(project=project, id=run, resume="allow", **about)

    def write(self, step: int, metrics: Row) -> None:
        """Writes one line and flushes it. Numbers that are not finite become null: NaN is not JSON.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        if self._file is None:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if self._events is not None and isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {reason_of(error)}") from error
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which the write before has told
                self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _event_writer() -> Any:
    """The class that writes TensorBoard's event files; an optional package has it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard events need the package tensorboardX (extra `tensorboard`)") from error
    return SummaryWriter


def read_runlog(path: str | os.PathLike[str]) -> list[Json]:
    """Reads a JSONL log. A last line cut short by a crash is left out.

    Raises:
        UserError: another line is not a JSON object with a `step`; the message names file and line.
    """
    require_regular(path)
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):  # the process was killed as it wrote this one
                break
            raise UserError(f"{path}:{number}: not a JSON object with a step") from error
        records.append(record)
    return records
