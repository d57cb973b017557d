"""`kmq-jax COMMAND` and `python -m kmq_jax COMMAND`: finds the command and runs it."""

import difflib
import importlib
import sys

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options

COMMANDS = {
    "train": "train a network from a configuration; resumes where it stopped",
    "study": "a whole study from one configuration, with a report",
    "lay_out": "fetch and lay out a public corpus, with trial lists",
    "draw_trials": "draw a trial list from data that has none",
    "prepare_data": "decode a corpus once into shards",
    "import_model": "bring a checkpoint of another toolkit",
    "quantize": "pack a model into codebooks and indices",
    "summarize": "show what a model weighs, layer by layer",
    "export": "write a model as ONNX",
    "demo": "try a model in a browser, on a page of this machine",
    "push": "put a model and its card on the Hugging Face Hub",
    "extract": "embed every utterance of a dataset",
    "score": "score a trial list: EER, minDCF, Cllr with intervals",
    "diagnose": "find where low-bit errors come from",
    "conditions": "see whether few bits suffer more where speech is short or bad",
    "calibrate": "fit a cascade: maps, threshold, gates",
    "cascade": "run a cascade over a trial list",
    "threshold": "find the threshold for a wanted false-accept rate, from own recordings",
    "verify": "decide whether two recordings are of one speaker",
    "enroll": "add recordings of a speaker to a store",
    "identify": "find whose voice of a store a recording is",
    "speakers": "list the speakers of a store, or remove one",
    "tables": "write tables of a Markdown file from the JSON of studies",
    "bench": "measure parts of the library beside other tools",
}
"""Every command, in the order in which a newcomer meets them."""


def usage() -> str:
    """What `kmq-jax --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kmq-jax COMMAND [--FLAG=VALUE ...]",
            "",
            "k-means low-bit quantization for speaker verification.",
            "",
            *lines,
            "",
            "`kmq-jax COMMAND --help` shows a command's flags and an example.",
            'Tab completion: eval "$(kmq-jax --completion=bash)" in bash.',
        ]
    )


def main() -> None:
    """Runs the command that the command line names; exits with its status."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.argv = [f"kmq-jax {words[0]}", *words[1:]]
        run(words[0])  # does not return
    command.run("", lambda: answer(words))


def run(name: str) -> None:
    """Runs a command on this process's command line; exits with its status."""
    options: list[type[Options]] = []

    def main() -> None:
        # Imported where errors are handled: an import takes long enough to be interrupted.
        module = importlib.import_module(f"kmq_jax.cli.{name}")
        found = getattr(module, "COMMAND", None)
        options.extend(found.options if found else ())
        module.main()

    command.run(name, main, options)


def answer(words: list[str]) -> None:
    """What `kmq-jax` says where no command is named.

    Raises:
        UserError: the first word is neither a command nor a flag.
    """
    if not words:
        print(usage())
        sys.exit(2)
    if words[0] in ("--help", "-h", "help"):
        print(usage())
    elif words[0] == "--version":
        from kmq_jax import __version__

        print(f"kmq-jax {__version__}")
    elif words[0].startswith("--completion="):
        from kmq_jax.cli.completion import script

        print(script(words[0].partition("=")[2], COMMANDS))
    else:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown command {words[0]!r}{hint} (see kmq-jax --help)")
