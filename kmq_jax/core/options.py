"""Options: frozen dataclasses whose fields carry their help text and the values they take.

A group of options derives from `Options` and describes each field by `option`. Values are checked once, when the
dataclass is made, whoever makes it: a command line, a configuration file or a program.

>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class Example(Options):
...     bits: int = option("bits a weight", at_least=1, at_most=8)
...     method: str = option("how centroids are found", "lloyd", choices=("lloyd", "quantile"))
>>> Example(bits=2)
Example(bits=2, method='lloyd')
>>> Example(bits=9)
Traceback (most recent call last):
kmq_jax.core.errors.UserError: `bits` (=9) must be at most 8
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from kmq_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What `option` was given for a field. For a tuple, ranges and choices hold for each item."""

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[object, ...] = ()
    suffixes: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str | None = None
    repeat: bool = False
    writes: str = ""
    positional: bool = False
    or_zero: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with one value, as "must be ...", or None."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        # Before the ranges: infinity lies in any that has no upper end.
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if isinstance(value, int) and abs(value) >= 1 << 63:
            return "must be less than 2^63"
        if self.suffixes and not str(value).endswith(self.suffixes):
            return f"must end in {' or '.join(', '.join(self.suffixes).rsplit(', ', 1))}"
        if self.or_zero and value == 0:
            return None
        for name, words, kept in (
            ("at_least", "at least", lambda limit: value >= limit),
            ("above", "above", lambda limit: value > limit),
            ("at_most", "at most", lambda limit: value <= limit),
            ("below", "below", lambda limit: value < limit),
        ):
            limit = getattr(self, name)
            if limit is not None and not kept(limit):
                return f"must be {'0 or ' if self.or_zero and name == 'at_least' else ''}{words} {limit}"
        return None


def option(
    help: str,
    default: object = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[object] = (),
    suffixes: Sequence[str] = (),
    metavar: str | None = None,
    flag: str | None = None,
    repeat: bool = False,
    writes: Literal["", "file", "directory"] = "",
    positional: bool = False,
    or_zero: bool = False,
) -> Any:
    """A field of an `Options` dataclass.

    Args:
        help: what the field is; the documentation of the field and the help of its flag. It does not name the default.
        default: the field is required where it is left out.
        at_least: the least value.
        above: the value must be greater than this.
        at_most: the greatest value.
        below: the value must be less than this.
        choices: the only values. A field annotated with `Literal` needs none.
        suffixes: what a file's name may end in.
        metavar: stands for the value in the flag's help, such as "BITS:MODEL".
        flag: the flag's name, where it is not the field's.
        repeat: a tuple of numbers is given by repeating the flag, not separated by commas.
        writes: the field names a file or a directory that is written; everything else that names one is read. What
            cannot be written is found before the work (`core.outputs`).
        positional: its values stand on the command line by themselves, without a flag; `metavar` names them there.
        or_zero: 0 is a value, too, whatever the least one is: it means none.
    """
    ends = at_least, above, at_most, below
    limits = Limits(help, *ends, tuple(choices), tuple(suffixes), metavar, flag, repeat, writes, positional, or_zero)
    return dataclasses.field(default=default, metadata={"option": limits})


def draws(help: str = "bootstrap draws of speakers; 0: no intervals", default: int = 1000) -> Any:
    """A field that counts bootstrap draws: none, or so many that the central 95 % of them are not all of them."""
    return option(help, default, at_least=20, at_most=100_000, or_zero=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all groups of options: turns values into the annotated types and checks them."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: "`name` (=value) must be ...".
        """
        for field in dataclasses.fields(self):
            # The class is frozen: this is the one way to keep the converted value.
            object.__setattr__(self, field.name, self._converted(field.name, getattr(self, field.name)))
            value = getattr(self, field.name)
            limits = limits_of(field)
            if value is None:
                continue
            kind = kind_of(type(self), field.name)
            if kind.choices:
                limits = dataclasses.replace(limits, choices=kind.choices)
            # Of a tuple, limits are those of each item.
            for one in value if kind.many else (value,):
                if what := limits.problem(one):
                    raise UserError(f"`{field.name}` (={shown(value)}) {what}")

    def _converted(self, name: str, value: object) -> object:
        kind = kind_of(type(self), name)
        if value is None and kind.optional:
            return None
        try:
            if not kind.many:
                return _cast(value, kind.type)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError("a list")
            return tuple(_cast(one, kind.type) for one in value)
        except ValueError as error:
            raise UserError(f"`{name}` (={shown(value)[:200]}) must be {error}") from None

    @classmethod
    def of(cls, values: Mapping[str, object], where: str = "") -> Self:
        """Makes the options from a mapping, such as a section of a configuration file.

        Args:
            values: by name of the field.
            where: stands before names in errors: "study.calibration".

        Raises:
            UserError: a name is unknown or missing, or a value is out of range.
        """
        prefix = f"{where}: " if where else ""
        names = [field.name for field in dataclasses.fields(cls)]
        # Unknown names first: whoever misspells a name also leaves the right one out.
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(names)}"
                raise UserError(f"{prefix}there is no option `{name}`; {hint}")
        for field in dataclasses.fields(cls):
            if field.name not in values and field.default is dataclasses.MISSING:
                raise UserError(f"{prefix}`{field.name}` must be given")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from error


@dataclasses.dataclass(frozen=True)
class Kind:
    """A field's annotation, read: `type` (of each item, where there are `many`), `choices` of a Literal, `| None`."""

    type: type
    many: bool
    optional: bool
    choices: tuple[object, ...]


def kind_of(options: type[Options], name: str) -> Kind:
    """Reads the annotation of a field of an `Options` class."""
    hint: Any = typing.get_type_hints(options)[name]
    optional, many = False, False
    choices: tuple[object, ...] = ()
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        # `X | None` is the only union that a field may have.
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        optional = True
    if typing.get_origin(hint) is tuple:
        hint, many = typing.get_args(hint)[0], True
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])  # the values of a Literal here are of one type
    return Kind(hint, many, optional, choices)


def limits_of(field: "dataclasses.Field[object]") -> Limits:
    """The `option` that a field was made by."""
    return field.metadata.get("option") or Limits("")


def refuse_given(options: Options, names: Sequence[str], why: str) -> None:
    """Refuses options that were given but would do nothing. Zero and empty values count as not given.

    Args:
        options: as given; one that has its default counts as not given.
        names: of the options to look at.
        why: follows the name in the message.

    Raises:
        UserError: one was given.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Example(Options):
    ...     draws: int = option("for intervals", 1000)
    >>> refuse_given(Example(), ["draws"], "does not go with `stream`")
    >>> refuse_given(Example(draws=50), ["draws"], "does not go with `stream`")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: `draws` does not go with `stream`
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in names and value and value != field.default:
            raise UserError(f"`{field.name}` {why}")


def shown(value: object) -> str:
    """A value as messages and help show it: a tuple's items are separated by commas.

    >>> shown((0.05, 2))
    '0.05,2'
    """
    if isinstance(value, (tuple, list)):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _cast(value: Any, kind: type) -> object:
    """The value as the annotated type, where nothing is lost.

    Raises:
        ValueError: it is of another type; the message is what it must be.
    """
    if kind is Path and isinstance(value, str):
        return Path(value)
    if typing.get_origin(kind) is tuple:  # what it holds is checked by the options that have it
        if not isinstance(value, (tuple, list)):
            raise ValueError("a list of lists")
        return tuple(value)
    if hasattr(value, "item") and not isinstance(value, (str, bool)) and getattr(value, "size", 1) == 1:
        value = value.item()  # a scalar of numpy
    # True is an int to Python: it must not pass for 1.0.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("a finite number") from None
    if kind in NAMES and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise ValueError(NAMES[kind])
    return value
