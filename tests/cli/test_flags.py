import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from kmq_jax.cli import command
from kmq_jax.cli.flags import add_flags, options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Example(Options):
    bits: int = option("bits a weight", at_least=1, at_most=8)
    levels: tuple[str, ...] = option("one a level", (), flag="stage", metavar="BITS:FILE")
    rule: Literal["pareto", "risk"] = option("100 % of gates", "pareto")
    edges: tuple[float, ...] = option("of bins", (0.1, 0.2), above=0)
    thresholds: tuple[float, ...] = option("here too", (), flag="threshold", repeat=True)
    out: Path | None = option("file to write", None)
    quick: bool = option("hurry", False)
    seed: int = option("of draws", 0)


def parsed(*words):
    parser = command.parser("example", "Does.", "kmq-jax example")
    add_flags(parser, Example)
    return options_of(Example, parser.parse_args(words))


def test_flags_become_options():
    assert parsed("--bits=2") == Example(bits=2)
    words = "--bits=2 --stage=2:a --stage=3:b --rule=risk --edges=1,2.5 --threshold=.5 --threshold=-1 --out=x --quick"
    expected = Example(
        bits=2, levels=("2:a", "3:b"), rule="risk", edges=(1, 2.5), thresholds=(0.5, -1), out=Path("x"), quick=True
    )
    assert parsed(*words.split()) == expected


@pytest.mark.parametrize(
    "word, message",
    [
        ("--bits=9", "--bits (=9) must be at most 8"),
        ("--bits=two", "--bits (=two) must be a whole number"),
        ("--edges=1,x", "--edges (=1,x) must be numbers separated by commas"),
        ("--edges=nan", "--edges (=nan) must be a finite number"),
        ("--threshold=inf", "--threshold (=inf) must be a finite number"),
        ("--rule=best", "--rule (=best) must be one of pareto, risk"),
    ],
)
def test_errors_name_the_flag(word, message):
    with pytest.raises(UserError) as error:
        parsed(*(() if word.startswith("--bits") else ("--bits=2",)), word)
    assert str(error.value) == message


def test_help_is_the_fields_text_and_a_computed_default():
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    text = " ".join(parser.format_help().split())
    for shown in (
        "--bits N bits a weight",
        "--stage BITS:FILE one a level",
        "{pareto,risk} 100 % of gates (default: pareto)",
        "--edges X,... of bins (default: 0.1,0.2)",
        "--quick hurry --seed N of draws (default: 0)",
        "--out FILE file to write --",
    ):
        assert shown in text


@dataclass(frozen=True, kw_only=True)
class Positional(Options):
    name: str | None = option("who", None)
    files: tuple[Path, ...] = option("recordings", (), positional=True, metavar="RECORDING")
    quick: bool = option("hurry", False)


@pytest.mark.parametrize("words", ["--name=a x y", "x --name=a y", "x y --name=a"])
def test_positional_values_stand_anywhere_among_flags(words, monkeypatch):
    found = command.Command("example", "Does.", "kmq-jax example", (Positional,))
    monkeypatch.setattr("sys.argv", ["kmq-jax example", *words.split()])
    assert options_of(Positional, found.parse()) == Positional(name="a", files=(Path("x"), Path("y")))
    monkeypatch.setattr("sys.argv", ["kmq-jax example"])
    assert options_of(Positional, found.parse()) == Positional()


def test_errors_name_a_positional_value_as_help_does(tmp_path, monkeypatch):
    found = command.Command("example", "Does.", "kmq-jax example", (Positional,))
    monkeypatch.setattr("sys.argv", ["kmq-jax example", "/dev/null"])
    with pytest.raises(UserError, match="^RECORDING: cannot read /dev/null"):
        options_of(Positional, found.parse())


def test_one_positional_value_may_be_required(monkeypatch, capsys):
    @dataclass(frozen=True, kw_only=True)
    class One(Options):
        file: Path = option("recording", positional=True)

    found = command.Command("example", "Does.", "kmq-jax example", (One,))
    monkeypatch.setattr("sys.argv", ["kmq-jax example", "x"])
    assert options_of(One, found.parse()) == One(file=Path("x"))
    for words in ([], ["x", "y"]):
        monkeypatch.setattr("sys.argv", ["kmq-jax example", *words])
        with pytest.raises(SystemExit) as stopped:
            found.parse()
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_flag_of_one_value_is_not_given_twice(capsys):
    """The last one used to count, in silence."""
    with pytest.raises((SystemExit, UserError)) as caught:
        parsed("--bits=2", "--bits=3")
    assert "--bits is given twice" in f"{caught.value} {capsys.readouterr().err}"
    assert parsed("--bits=2", "--threshold=1", "--threshold=2").thresholds == (1.0, 2.0)


@pytest.mark.parametrize("words", ["--name=a -- -x --y", "--name=a -- -x --name=b", "z --name=a -- -x"])
def test_after_two_hyphens_a_file_may_begin_with_one(words, monkeypatch):
    found = command.Command("example", "Does.", "kmq-jax example", (Positional,))
    monkeypatch.setattr("sys.argv", ["kmq-jax example", *words.split()])
    if words.startswith("z"):  # values on both sides of a flag do not go with `--`
        with pytest.raises(SystemExit):
            found.parse()
        return
    made = options_of(Positional, found.parse())
    assert made == Positional(name="a", files=tuple(map(Path, words.split()[2:])))


@pytest.mark.parametrize("place", ["W=a.kmq,b.kmq", "W=b.kmq,a.kmq", "2:a.kmq", "b.kmq,a.kmq"])
def test_an_output_is_none_of_the_places_that_a_value_names(place, tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Reads(Options):
        pair: tuple[str, ...] = option("models", (), metavar="NAME=MODEL,MODEL")
        json: Path | None = option("figures", None, writes="file")

    monkeypatch.chdir(tmp_path)
    parser = command.parser("example", "Does.", "kmq-jax example")
    add_flags(parser, Reads)
    with pytest.raises(UserError, match=r"--json \(=a.kmq\) is also --pair, which is read"):
        options_of(Reads, parser.parse_args([f"--pair={place}", "--json=a.kmq"]))
