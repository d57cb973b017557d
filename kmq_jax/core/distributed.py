"""Several processes that work together: how they join, and how they exchange values."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.tree import Params

T = TypeVar("T")

HERE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables of a process that is started by hand: `host:port` of process 0, how many there are, which this one is."""

CLUSTER = "KMQ_DISTRIBUTED"
"""Set to 1 where JAX finds the other processes by itself, but no variable shows it: on a Cloud TPU slice."""


def join() -> None:
    """Joins the processes that were started together; does nothing where this is the only one.

    They are found in this order: the variables `HERE`; several tasks of one SLURM step; the hosts of a TPU slice on
    GKE; `CLUSTER`. Must come before anything that asks JAX for devices.

    Raises:
        UserError: a variable is missing or wrong, or the processes do not find one another.
    """
    given = [name for name in HERE if os.environ.get(name)]
    # A step of one task, or a slice of one host, has nobody to join.
    slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    gke = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not (given or slurm or gke or os.environ.get(CLUSTER) == "1"):
        return
    initialize: Callable[[], None] = jax.distributed.initialize
    if given:
        if len(given) < len(HERE):
            raise UserError(f"{given[0]} is set, so {' and '.join(n for n in HERE if n not in given)} must be, too")
        address, count, number = (os.environ[name] for name in HERE)
        if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
            raise UserError(f"{HERE[2]} (={number}) must be a whole number below {HERE[1]} (={count})")
        # What is given by hand is all there is: without "deactivate" JAX would also ask SLURM or the cloud.
        initialize = functools.partial(
            jax.distributed.initialize,
            coordinator_address=address,
            num_processes=int(count),
            process_id=int(number),
            cluster_detection_method="deactivate",
        )
    # Training listens to SIGTERM itself; JAX's own listener would swallow it before training begins.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        initialize()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cannot join the other processes: {first_line(error)}") from error


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process. All must call it.

    >>> anywhere(False)  # one process alone
    False
    """
    return bool(_from_all(np.array(flag)).any())


def of_first(values: np.ndarray) -> np.ndarray:
    """The `values` of process 0. All must call it, with arrays of one shape and type.

    >>> of_first(np.array([3, 4])).tolist()
    [3, 4]
    """
    return _from_all(values)[0]


def mean_of_all(tree: Params) -> Params:
    """The mean over all processes of each array of a tree. All must call it."""
    return jax.tree.map(lambda values: _from_all(np.asarray(values)).mean(axis=0), tree)


def sum_of_all(values: np.ndarray) -> np.ndarray:
    """The sum over all processes of an int64 or float64 array of at least one axis. All must call it.

    >>> sum_of_all(np.array([1 << 40])).tolist()
    [1099511627776]
    """
    halves = np.ascontiguousarray(values).view(np.uint32)  # JAX would round to 32 bits: send the halves as they are
    return np.ascontiguousarray(_from_all(halves)).view(values.dtype).sum(axis=0)


def highest_of_all(values: np.ndarray) -> np.ndarray:
    """The highest over all processes of each element of an array of at most 32 bits. All must call it.

    >>> highest_of_all(np.array([-1, 3], np.int8)).tolist()
    [-1, 3]
    """
    return _from_all(values).max(axis=0)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block in all processes; an exception in one fails it in all, so that none waits for ever.

    All must run it, and nothing within may wait for the others. What ends the process at once, such as Ctrl-C, passes,
    and the other processes are not told.

    Raises:
        Exception: this process's own.
        UserError: another process failed.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is: the others wait
        failed = error
    if anywhere(failed is not None):
        raise failed or UserError("stopped: another process failed, and says why")


@contextlib.contextmanager
def entered_by_all(manager: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """Runs a block within a context of each process's own, such as a file that it writes; as `all_or_none`.

    An exception on entering, within the block or on leaving fails it in all.

    >>> with entered_by_all(contextlib.nullcontext("mine")) as value:
    ...     print(value)
    mine
    """
    with contextlib.ExitStack() as stack:
        with all_or_none():
            value = stack.enter_context(manager)
        with all_or_none():
            yield value
        with all_or_none():
            stack.close()  # a disk may be full only now, when the last bytes go out


def local(tree: Params) -> Params:
    """Arrays over the devices of all processes as whole arrays of this one. All must call it."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(tree, tiled=True))


def _from_all(values: np.ndarray) -> np.ndarray:
    """The values of every process, `[processes, ...]`."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))
