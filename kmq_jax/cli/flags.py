"""Flags of the command line, made from `Options` dataclasses: the one place where fields become flags."""

import argparse
import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import require_regular
from kmq_jax.core.options import NAMES, Options, kind_of, limits_of, shown
from kmq_jax.core.outputs import check_outputs

T = TypeVar("T", bound=Options)

RENAMED: dict[str, dict[str, str]] = {
    "quantize": {"--recalibrate": "--data"},
}
"""Old flag -> new flag, by command: for one release an error names the new one."""

LOOKALIKES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
"""Dashes that word processors and web pages put in place of hyphens."""

_GROUPS = " groups"
"""The attribute in which a namespace keeps the options made from it. No flag can have a space in its name."""

METAVARS = {int: "N", float: "X", Path: "FILE", str: "TEXT"}
"""What stands for a value in `--help`, by the field's type."""


def add_flags(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Adds a flag for each field of an `Options` class.

    A flag's help is the field's text and its default. A bool is a switch. A tuple of texts is given by repeating the
    flag, a tuple of numbers is separated by commas. A positional field has no flag, only values.

    >>> from dataclasses import dataclass
    >>> from kmq_jax.core.options import option
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Example(Options):
    ...     sizes: tuple[int, ...] = option("sizes to try", (1, 2), at_least=1)
    >>> parser = argparse.ArgumentParser()
    >>> add_flags(parser, Example)
    >>> options_of(Example, parser.parse_args(["--sizes=3,4"]))
    Example(sizes=(3, 4))
    """
    for field in dataclasses.fields(options):
        limits, kind = limits_of(field), kind_of(options, field.name)
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        words: dict[str, Any] = {
            "dest": field.name,
            "help": _help(limits.help, None if required else default),
            "default": default,
        }
        if kind.type is bool:
            parser.add_argument(_flag(field), action="store_true", **words)
            continue
        # No `type=` and no `choices=` for argparse: `options_of` reads the text, and its errors name the value.
        choices = limits.choices or kind.choices
        listed = "{" + ",".join(map(str, choices)) + "}" if choices else METAVARS.get(kind.type, "TEXT")
        if limits.positional:
            nargs = ("+" if required else "*") if kind.many else (None if required else "?")
            parser.add_argument(field.name, nargs=nargs, metavar=_flag(field), help=words["help"], default=default)
            continue
        words |= {"required": required, "metavar": limits.metavar or listed}
        if kind.many and (kind.type in (str, Path) or limits.repeat):
            parser.add_argument(_flag(field), action=_Append, **words)
        else:
            if kind.many and not limits.metavar:
                words["metavar"] = f"{listed},..."
            parser.add_argument(_flag(field), action=_Once, **words)


def options_of(options: type[T], args: argparse.Namespace) -> T:
    """Makes the options from what a parser with their flags has parsed.

    A command may have several groups of options. The places in all groups made so far are checked together.

    Raises:
        UserError: a value cannot be read or is out of range, an output cannot be written or is also read, or an input
            is a pipe or a device; the message names the flag.
    """
    values = {}
    for field in dataclasses.fields(options):
        value, kind = getattr(args, field.name), kind_of(options, field.name)
        # `--flag=` means None, also where the default is another value.
        if value == "" and kind.optional:
            value = None
        elif isinstance(value, str):
            parts = [part for part in value.split(",") if part] if kind.many else [value]
            read: list[object] = [_read(part, kind.type, _flag(field), value, kind.many) for part in parts]
            value = tuple(read) if kind.many else read[0]
        # A repeated flag. Its default is a tuple, which needs no reading.
        elif isinstance(value, list):
            value = tuple(_read(part, kind.type, _flag(field), part, False) for part in value)
        values[field.name] = value
    try:
        made = options(**values)
    except UserError as error:
        raise UserError(name_flags(str(error), options)) from error
    # What one group writes may be what another reads.
    groups = vars(args).setdefault(_GROUPS, {})
    groups[options] = made
    _check_places(groups.values())
    return made


def _check_places(groups: Iterable[Options]) -> None:
    """Refuses outputs that cannot be written, or that are read, and inputs that are no files.

    Raises:
        UserError: the message names the flag.
    """
    outputs: dict[str, dict[str, Path]] = {"file": {}, "directory": {}}
    inputs: dict[str, list[str]] = {}
    for options in groups:
        for field in dataclasses.fields(options):
            limits, kind = limits_of(field), kind_of(type(options), field.name)
            value = getattr(options, field.name)
            if value is None or kind.type not in (str, Path) or kind.choices or limits.choices:
                continue
            if limits.writes:
                outputs[limits.writes][_flag(field)] = value
            else:
                inputs[_flag(field)] = _places(value if kind.many else (value,))
    for flag, places in inputs.items():
        for place in places:
            try:
                if not os.path.isdir(place):
                    require_regular(place)
            except UserError as error:
                raise UserError(f"{flag}: {error}") from error
    check_outputs(outputs["file"], outputs["directory"], inputs)


def _places(given: Sequence[object]) -> list[str]:
    """Every path that values may name: BITS:PLACE and NAME=PLACE name one; several are separated by commas."""
    # A wrong guess does no harm: a place that does not exist passes the checks.
    whole = [part for one in given for part in {str(one), re.sub(r"^(\d+:|[^=]*=)", "", str(one))}]
    return [part for one in whole for part in {one, *one.split(",")}]


def name_flags(message: str, *options: type[Options]) -> str:
    """A message with flags in place of the names of fields in backticks.

    >>> from kmq_jax.scoring.options import HearOptions
    >>> name_flags("`bits` (=0) must be at least 1", HearOptions)
    '--bits (=0) must be at least 1'
    >>> from kmq_jax.core.options import Options
    >>> name_flags("`bits` (=9) must be at most 8", Options)
    '`bits` (=9) must be at most 8'
    """
    known = {field.name: _flag(field) for group in options for field in dataclasses.fields(group)}
    return re.sub(r"`(\w+)`", lambda found: known.get(found[1], found[0]), message)


def meant_flag(word: str) -> tuple[str, str] | None:
    """For a word that begins with dashes that are not hyphens: the word as it was meant, and the message about it.

    Other words give None.

    >>> meant_flag("\u2013bits=2")[0]
    '--bits=2'
    >>> meant_flag("--bits=2")
    """
    rest = word.lstrip("-" + LOOKALIKES)
    strange = word[: len(word) - len(rest)].strip("-")
    if not strange:
        return None
    meant = f"--{rest}"
    return meant, f"{word} begins with {unicodedata.name(strange[0])}, not with two hyphens; type {meant}"


def _flag(field: "dataclasses.Field[object]") -> str:
    """The flag of a field; for a positional one, the name that stands for its value."""
    limits = limits_of(field)
    return limits.metavar or field.name.upper() if limits.positional else f"--{limits.flag or field.name}"


def _help(text: str, default: object) -> str:
    """The text of a field and its default, if there is one to tell."""
    if not (default is None or default is False or default in ("", ())):
        text = f"{text} (default: {shown(default)})"
    return text.replace("%", "%%")  # argparse formats help with "%"


def _read(text: str, kind: type, flag: str, whole: str, many: bool) -> object:
    """One value of a flag, from its text."""
    try:
        if kind is Path and not text:  # it would be the current directory
            raise ValueError
        return kind(text)
    except ValueError:
        what = f"{NAMES[kind].removeprefix('a ')}s separated by commas" if many else NAMES[kind]
        raise UserError(f"{flag} (={whole}) must be {what}") from None


class _Once(argparse.Action):
    """Takes a value and refuses a second one: nobody can tell which of two recordings was meant."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Keeps the value."""
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            parser.error(f"{option_string} is given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Append(argparse.Action):
    """Collects the values of a repeated flag; the first of them replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)  # a list once the flag was seen; the default is a tuple
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), values])


def way_of(
    groups: Sequence[Options], ways: Mapping[str, tuple[Sequence[str], Sequence[str]]], always: Sequence[str]
) -> str:
    """Chooses one of several ways in which a command can run. Each is asked for by the option of its name.

    Args:
        groups: the command's options, as given.
        ways: by name: the options that a way needs, and those that it may take. A later way's name may be among those
            that an earlier one takes.
        always: options that go with every way.

    Returns:
        The name of the way.

    Raises:
        UserError: none or two are asked for, something is missing, or something goes with another way.
    """
    fields = [(group, field) for group in groups for field in dataclasses.fields(group)]
    values = {field.name: getattr(group, field.name) for group, field in fields}
    asked = [way for way in ways if values[way]]
    # With `--store` the option `--model` asks for no way of its own, since a store takes it.
    asked = asked[:1] if asked and set(asked[1:]) <= set(ways[asked[0]][1]) else asked
    if len(asked) != 1:
        names = [f"`{way}`" for way in ways]
        raise UserError(f"one of {', '.join(names[:-1])} and {names[-1]} must be given")
    way = asked[0]
    needed, taken = ways[way]
    for name in needed:
        if not values[name]:
            raise UserError(f"`{name}` must be given with `{way}`")
    own = {way, *needed, *taken, *always}
    for _, field in fields:
        if field.name not in own and values[field.name] != field.default:
            raise UserError(f"`{field.name}` does not go with `{way}`")
    return way
