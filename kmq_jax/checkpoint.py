"""Checkpoints of a run. The only module that imports orbax."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax

from kmq_jax.core.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports deprecate one another
    from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """The numbered checkpoints below one directory, the newest few of them kept.

    A checkpoint takes its final name only when it is whole, so whatever is listed can be restored.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 1):
        """Opens (and makes, on the first save) `directory`, keeping the `keep` newest checkpoints."""
        self.directory = Path(directory).resolve()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(found.step for found in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves `state` (a tree of arrays) and the position of `data` (a grain iterator) as checkpoint `step`.

        Raises:
            UserError: it cannot be written (full disk, no permission); earlier checkpoints stay.
        """
        if step in self.steps():
            return
        try:
            self._checkpointer.save_checkpointables(step, {"state": state, "data": data})
        except Exception as error:  # orbax wraps a full disk in errors of its own, by layer
            raise UserError(f"cannot save checkpoint {step} to {self.directory}: {_first_line(error)}") from error

    def restore(self, step: int, state: Any, data: Any) -> Any:
        """Restores checkpoint `step`; `data` is moved to its position in place.

        Args:
            step: one of `steps()`.
            state: tree of `jax.ShapeDtypeStruct` (or arrays) giving structure, shapes and shardings.
            data: a grain iterator made as the saved one was.

        Returns:
            The state.

        Raises:
            UserError: the checkpoint is damaged or its structure differs.
        """
        try:
            return self._checkpointer.load_checkpointables(step, {"state": state, "data": data})["state"]
        except Exception as error:
            raise UserError(f"cannot restore {self.directory}/{step}: {_first_line(error)}") from error

    def close(self) -> None:
        """Waits for what is under way and lets go of the directory."""
        self._checkpointer.close()


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Saves one tree of arrays as the directory `path`, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        ocp.save(Path(path).resolve(), tree, overwrite=True)
    except Exception as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}") from error


def load_tree(path: str | os.PathLike[str], tree: Any = None) -> Any:
    """Loads what `save_tree` wrote, or the state of one numbered checkpoint, on this process's first device.

    Args:
        path: the directory.
        tree: structure and shapes to load as; None takes the stored structure, as nested dicts of numpy arrays.

    Raises:
        UserError: it is missing, damaged or of another structure.
    """
    try:
        if (Path(path) / "state").is_dir():
            return ocp.load(Path(path).resolve(), tree, checkpointable_name="state")
        return ocp.load(Path(path).resolve(), tree)
    except Exception as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}") from error


def abstract(tree: Any) -> Any:
    """The shapes, dtypes and shardings of a tree of arrays, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
