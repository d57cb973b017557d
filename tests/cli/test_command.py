import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option
from kmq_jax.core.progress import progress


def test_a_wrong_flag_is_one_line_and_status_2(capsys):
    parser = command.parser("score", "Scores.", "python -m kmq_jax.score")
    parser.add_argument("--top_n", type=int)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--top_n=many"])
    out = capsys.readouterr()
    assert stopped.value.code == 2 and out.err.count("\n") == 1 and "--top_n" in out.err and not out.out


@pytest.mark.parametrize("word", ["--bitz=2", "--bitz"])
def test_a_misspelt_flag_is_named_and_not_the_one_it_leaves_missing(word, capsys):
    parser = command.parser("quantize", "Quantizes.", "python -m kmq_jax.quantize")
    parser.add_argument("--bits", required=True)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([word, "2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ("kmq-jax quantize: unknown flag --bitz; did you mean --bits? (see --help)\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["--bits=2", "--weather"])
    assert capsys.readouterr().err == "kmq-jax quantize: unknown flag --weather (see --help)\n"


def test_help_has_the_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parser("score", "Scores.", "python -m kmq_jax.score --x").parse_args(["--help"])
    assert stopped.value.code == 0 and "python -m kmq_jax.score --x" in capsys.readouterr().out


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("--bits (=9) must be\n 1 to 8")

    with pytest.raises(SystemExit) as stopped:
        command.run("quantize", main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "kmq-jax quantize: --bits (=9) must be 1 to 8\n"


@pytest.mark.parametrize("encoding, written", [
    ("latin-1", b"\\u738b Zo\xeb caf\xe9\n"),
    ("ascii", b"\\u738b Zo\\xeb caf\xe9\n"),
    ("utf-8", "王 Zoë caf".encode() + b"\xe9\n"),
])  # fmt: skip
def test_names_that_the_terminal_does_not_know_are_written_all_the_same(encoding, written):
    # The last is a file's name that is not UTF-8, as Python has it.
    code = r"from kmq_jax.cli.command import run; run('x', lambda: print('\u738b Zo\xeb caf\udce9'))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, written, b"")


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run("x", lambda: 1 / 0)


def test_progress_without_a_terminal_is_plain_lines(capsys):
    assert list(progress([1, 2, 3], desc="embedding", interval=0.0)) == [1, 2, 3]
    err = capsys.readouterr().err
    assert "embedding: 1/3 (33 %)" in err and "\r" not in err


@pytest.mark.parametrize("dash", ["\u2013", "\u2014", "\u2010", "\u2013-", "\u2212\u2212"])
def test_a_dash_that_is_no_hyphen_is_told(dash, capsys):
    parser = command.parser("quantize", "Quantizes.", "kmq-jax quantize")
    parser.add_argument("--bits", required=True)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([f"{dash}bits=2"])
    name = {"\u2013": "EN DASH", "\u2014": "EM DASH", "\u2010": "HYPHEN", "\u2212": "MINUS SIGN"}[dash[0]]
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and name in err and "type --bits=2" in err


def test_a_file_may_be_named_with_a_dash():
    parser = command.parser("quantize", "Quantizes.", "kmq-jax quantize")
    parser.add_argument("--model")
    assert parser.parse_args(["--model", "\u2013a.kmq"]).model == "\u2013a.kmq"


def test_an_interruption_that_a_callback_swallows_comes_again():
    code = (
        "import gc, os, signal, time\n"
        "from kmq_jax.cli import command\n"
        "def swallow(*_):\n"
        "    gc.callbacks.clear()\n"
        "    raise KeyboardInterrupt\n"
        "def main():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    gc.callbacks.append(swallow)\n"
        "    gc.collect()\n"
        "    time.sleep(60)\n"
        "command.run('x', main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_flag_without_its_value_does_not_take_the_next_flag_for_it():
    line = ["study", "--config=quickstart:smoke", "--workdir", "--config.data.train=x"]
    done = subprocess.run([sys.executable, "-m", "kmq_jax", *line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--workdir has no value" in done.stderr


def test_an_interruption_that_a_library_turns_into_its_own_error_stays_one():
    code = (
        "import os, signal, time\n"
        "from kmq_jax.cli import command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(20)\n"
        "    except BaseException as error:\n"
        "        raise ImportError('broken') from error\n"
        "command.run('x', main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_misspelt_flag_is_named_by_every_python(monkeypatch, capsys):
    """In newer Pythons intermixed parsing does not go through `parse_known_args`: simulated here."""
    plain = argparse.ArgumentParser
    monkeypatch.setattr(plain, "parse_known_intermixed_args", plain.parse_known_args)

    @dataclass(frozen=True, kw_only=True)
    class Given(Options):
        bits: int = option("bits a weight")

    monkeypatch.setattr("sys.argv", ["kmq-jax quantize", "--bitz=2"])
    with pytest.raises(SystemExit) as stopped:
        command.Command("quantize", "Quantizes.", "kmq-jax quantize", (Given,)).parse()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "kmq-jax quantize: unknown flag --bitz; did you mean --bits? (see --help)\n"


def test_what_cannot_be_raised_is_left_to_the_hook_that_was_there(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    command._hear_interrupts.cache_clear()
    command._hear_interrupts()
    command._hear_interrupts()  # once in a process
    found = SimpleNamespace(exc_value=RuntimeError("another"))
    sys.unraisablehook(found)
    command._hear_interrupts.cache_clear()
    assert heard == [found]
