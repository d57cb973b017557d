"""Checkpoints of a run. The only module that imports orbax."""

import os
import warnings
from pathlib import Path

import jax

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports deprecate one another
    from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """The numbered checkpoints below one directory, the newest few of them kept.

    A checkpoint gets its final name only when it is complete, so every one that is listed can be restored.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 1):
        """Opens (and makes, on the first save) `directory`, keeping the `keep` newest checkpoints."""
        self.directory = Path(directory).resolve()
        # What a killed run left half written is removed on opening.
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(found.step for found in self._checkpointer.checkpoints)

    def save(self, step: int, **parts: object) -> None:
        """Saves named parts as checkpoint `step`: trees of arrays, and grain iterators, of which it is the position.

        Raises:
            UserError: it cannot be written (full disk, no permission); earlier checkpoints stay.
        """
        # Saved before: the run resumed at this step, or was stopped right after it.
        if step in self.steps():
            return
        try:
            self._checkpointer.save_checkpointables(step, parts)
        except Exception as error:  # orbax wraps a full disk in errors of its own, by layer
            raise UserError(f"cannot save checkpoint {step} to {self.directory}: {_first_line(error)}") from error

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
            return self._checkpointer.load_checkpointables(step, parts)
        except Exception as error:
            raise UserError(f"cannot restore {self.directory}/{step}: {_first_line(error)}") from error

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
            raise UserError(f"cannot read {part} of {self.directory}/{step}: {_first_line(error)}") from error
        return jax.device_get(self.restore(step, **{part: shapes})[part])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for writes under way, then releases the directory."""
        self._checkpointer.close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
