"""`kmq-jax COMMAND` and `python -m kmq_jax COMMAND`: finds the command and runs it."""

import difflib
import importlib
import sys

COMMANDS = {
    "train": "train a network from a configuration; resumes where it stopped",
    "study": "a whole study from one configuration, with a report",
    "prepare_data": "decode a corpus once into shards",
    "import_model": "bring a WeSpeaker or Kiwano checkpoint",
    "quantize": "pack a model into codebooks and indices",
    "summarize": "show what a model weighs, layer by layer",
    "export": "write a model as ONNX",
    "extract": "embed every utterance of a dataset",
    "score": "score a trial list: EER, minDCF, Cllr with intervals",
    "diagnose": "find where low-bit errors come from",
    "calibrate": "fit a cascade: maps, threshold, gates",
    "cascade": "run a cascade over a trial list",
    "verify": "decide whether two recordings are of one speaker",
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
        ]
    )


def main() -> None:
    """Runs the command that the command line names; exits with its status."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0 if words else 2)
    name = words[0]
    if name == "--version":
        from kmq_jax import __version__

        print(f"kmq-jax {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"kmq-jax: unknown command {name!r}{hint} (see kmq-jax --help)", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"kmq-jax {name}", *words[1:]]
    from kmq_jax.cli import command

    command.run(name, importlib.import_module(f"kmq_jax.cli.{name}").main)
