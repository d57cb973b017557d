"""The flags of `train` and `study`: a configuration, changes of its settings, and a working directory."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kmq_jax.cli.flags import meant_flag
from kmq_jax.core.errors import UserError
from kmq_jax.core.outputs import check_outputs

if TYPE_CHECKING:
    import ml_collections
    from absl import flags as absl_flags

BOTH = ("--help", "--config=", "--workdir=")
FLAGS = {"train": ("--tensorboard", "--wandb="), "study": ("--engine=", "--only=", "--settings=")}
"""The flags of each command that takes a configuration, for tab completion."""

PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where configurations lie: in an installed package, and beside the package in a source tree."""


def asks_for_help() -> bool:
    """Whether the command line has one of the flags for help."""
    return bool({"--help", "-h", "--helpfull"} & set(sys.argv[1:]))


def configurations() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    for place in PLACES:
        if place.is_dir():
            return {path.stem: path for path in sorted(place.glob("*.py")) if path.stem != "__init__"}
    return {}


def find_config(value: str) -> str:
    """The file that `--config=NAME[:ARG]` or `--config=FILE.py[:ARG]` names, with `:ARG` as it was.

    Raises:
        UserError: a bare name is none of the configurations that come with the package; the message lists them.

    >>> find_config("some/where/mine.py:smoke")
    'some/where/mine.py:smoke'
    >>> find_config("quickstart:smoke").endswith("configs/quickstart.py:smoke")
    True
    """
    name, colon, arg = value.partition(":")
    if not name or name.endswith(".py") or "/" in name:
        return value
    known = configurations()
    if name not in known:
        raise UserError(f"--config (={name}) must be a file, or one of {', '.join(known)}")
    return f"{known[name]}{colon}{arg}"


def parse_flags(
    argv: list[str], more: "absl_flags.FlagValues | None" = None, short: Mapping[str, str] | None = None
) -> tuple["ml_collections.ConfigDict", Path]:
    """Reads `--config`, changes of its settings, and `--workdir`.

    Args:
        argv: the command line.
        more: further flags; their values are read from `argv`, too.
        short: flags that are short for settings: "--engine" for "--config.study.engine".

    Returns:
        The configuration with its changes, and the working directory.

    Raises:
        UserError: a flag or a configuration key is unknown or has a value of the wrong type, or a flag is given twice.
    """
    from absl import flags as absl_flags
    from ml_collections import config_flags

    values = absl_flags.FlagValues() if more is None else more
    words = _with_files(_given_once(argv, short or {}))
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    absl_flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        rest = values(words)
        config, workdir = values["config"].value, values["workdir"].value
        if config is not None:
            config.to_dict()  # an error of the file is raised only when its configuration is used
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(_told(str(error))) from error
    except (SyntaxError, ImportError, NameError, ArithmeticError, LookupError) as error:
        raise UserError(f"--config cannot be loaded: {type(error).__name__}: {error}") from error
    if rest[1:]:
        raise UserError(f"argument {rest[1]!r} is not a flag (see --help)")
    if config is None or workdir is None:
        raise UserError("--config and --workdir are both needed (see --help)")
    # Path("") would be the current directory; " " is refused.
    check_outputs({}, {"--workdir": Path(workdir or " ")}, {})
    return config, Path(workdir)


def _given_once(argv: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """The command line with short flags written out. Of settings the last one counts; other flags are given once."""
    words, seen = [], set()
    for word in argv:
        name, equals, value = word.partition("=")
        flag = f"--{name.lstrip('-')}" if re.match(r"--?[a-z]", name) else ""
        if flag in seen:
            raise UserError(f"{flag} is given twice (see --help)")
        if flag and not flag.startswith("--config."):
            seen.add(flag)
        words.append(f"{short[flag]}{equals}{value}" if flag in short else word)
    return words


def _with_files(argv: list[str]) -> list[str]:
    """The command line as ml_collections needs it: the configuration's file first, then changes of its settings."""
    words, first, before = [], [], ""
    for word in argv:
        if meant := meant_flag(word):
            raise UserError(f"{meant[1]} (see --help)")
        if before in ("--config", "-config", "--workdir", "-workdir") and word.startswith("--"):
            raise UserError(f"{before} has no value: {word} follows it (see --help)")
        flag, equals, value = word.partition("=")
        if flag.startswith(("--config.", "-config.")):
            # A key that is a number, as in study.epochs.2, is written as a subscript for the library.
            word = re.sub(r"\.(\d+)(?=\.|$)", r"['\1']", flag) + equals + value
        if flag in ("--config", "-config"):
            first.append(f"{flag}={find_config(value)}" if equals else word)
        elif before in ("--config", "-config"):
            first.append(find_config(word))
        else:
            words.append(word)
        before = word
    return words[:1] + first + words[1:]


def _told(message: str) -> str:
    """The message of absl's error, without the traceback of the configuration file that it may contain."""
    # Of a missing key it gives the name alone, or the name and the nearest, quoted twice.
    plain = message.strip("\"'").replace("\\n", "\n").replace("\\", "")
    if found := re.fullmatch(r"\W*(\w+)\W*?(?:\s*Did you mean \W(\w+)\W instead of .*)?", plain):
        near = f"; did you mean {found[2]}?" if found[2] else ""
        return f"the configuration has no setting {found[1]}{near}"
    if found := re.search(r"<class '(\w+)'> of field (\S+) is not supported for overriding", plain):
        return f"--{found[2]} is a {found[1]} in the configuration, which no flag can change: let the file say a tuple"
    if "Traceback" not in message:
        return message
    last = message.strip().splitlines()[-1]
    return "--config: " + last.removeprefix(f"{UserError.__module__}.UserError: ")
