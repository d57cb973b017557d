"""Work on many machines through Apache Beam: one element of the pipeline is one shard, and its worker writes it.

The shards are those of a local run, since the source alone cuts them. Their format is tfds's; its Beam writer
(`tfds.core.writer.BeamWriter`) is not used, for three reasons. It groups all examples by a hash of their keys, so that
every recording passes through the engine; here only names travel, and recordings are read where they are written. It
cuts shards by bytes, so they would not be those of a local run. And it moves its files into place once all are written;
here a shard that is there is kept, and a run that was killed goes on.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from typing import TypeVar

from kmq_jax.core.errors import UserError, needed

Task = TypeVar("Task")


def run(work: Callable[[Task], None], tasks: Sequence[Task], flags: str) -> None:
    """Does every task once, by the workers of a pipeline.

    Args:
        work: does one; a function of a module, which workers import.
        tasks: picklable.
        flags: Beam's pipeline options as on a command line, such as `--runner=DirectRunner`.

    Raises:
        UserError: Beam is not installed, does not know an option, or a task failed.
    """
    beam = needed("apache_beam", "`beam`")
    options = _options(flags)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | "shards" >> beam.Create(list(tasks))
                | "spread" >> beam.Reshuffle()  # else the engine may do one after the other
                | "write" >> beam.Map(work)
            )
    except Exception as error:  # engines raise whatever they wrap a worker's exception in
        raise UserError(f"`beam` (={flags}) failed: {_reason(error)}") from error


def _options(flags: str) -> "object":
    """Beam's pipeline options.

    Raises:
        UserError: they are not a command line, or Beam does not know one of them.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UserError(f"`beam` (={flags}) is no list of options: {error}") from None
    try:
        options = PipelineOptions(words)
        known = options.get_all_options()
    except (SystemExit, ValueError) as error:  # argparse ends the process
        raise UserError(f"`beam` (={flags}): Beam does not take these options") from error
    for word in words:  # Beam itself only warns of an option that it does not know
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise UserError(f"`beam` (={flags}): Beam has no option --{name}")
    return options


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without the engine's words around it."""
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0].partition(" [while running")[0]
