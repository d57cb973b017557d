"""The command line as a whole: help without JAX, completion, quiet ends, configurations by name."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kmq_jax.benchmarks.options import BENCHMARKS
from kmq_jax.cli import completion, config_flags, main
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import kind_of, limits_of

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "kmq_jax"]


def test_the_contract_that_no_command_imports_another_names_all_of_them():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (named,) = (one["modules"] for one in contracts if one["type"] == "independence")
    assert sorted(named) == sorted(f"kmq_jax.cli.{name}" for name in main.COMMANDS)


def test_every_help_comes_without_jax_or_numpy():
    code = """if True:
        import contextlib, io, json, sys
        from kmq_jax.cli import bench, main
        found = {}
        helps = [["bench", name, "--help"] for name in bench.benchmarks()]
        for words in [["--help"], *([name, "--help"] for name in main.COMMANDS), *helps]:
            sys.argv, out = ["kmq-jax", *words], io.StringIO()
            with contextlib.redirect_stdout(out):
                try:
                    main.main()
                except SystemExit as done:
                    assert not done.code, words
            found[" ".join(words[:-1]) or "--help"] = out.getvalue()
        print(json.dumps([found, [name for name in ("jax", "numpy", "ml_collections") if name in sys.modules]]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, imported = json.loads(done.stdout)
    assert not imported
    for name, text in shown.items():
        assert "usage:" in text or name == "bench"
        assert "example:" in text or name in ("--help", "bench")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kmq-jax ver", ["verify"]),
        ("kmq-jax verify --enr", ["--enrol="]),
        ("kmq-jax enroll --re", ["--replace"]),
        ("kmq-jax quantize --granularity=", ["channel", "tensor"]),
        ("kmq-jax train --config=quick", ["quickstart"]),
        ("kmq-jax study --wo", ["--workdir="]),
        ("kmq-jax bench fro", ["frontend"]),
    ],
)
def test_bash_completes_commands_flags_and_choices(line, expected):
    script = completion.script("bash", main.COMMANDS)
    lines = [
        script,
        f"COMP_LINE='{line}' COMP_POINT={len(line)}",
        "_kmq_jax 2>/dev/null",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.split() == expected


def test_completion_knows_every_flag_of_every_command():
    for name in main.COMMANDS:
        assert completion.flags_of(name), name
    with pytest.raises(UserError, match=r"--completion \(=fish\) must be bash"):
        completion.script("fish", main.COMMANDS)


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_a_reader_who_has_gone_is_no_error(gone):
    # More than a pipe holds, so that writing goes on after the reader's end.
    write = f"lambda: [print('y' * 100, file=sys.{gone}) for _ in range(10_000)]"
    code = f"import sys; from kmq_jax.cli import command; command.run('x', {write})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as running:
        read, other = (running.stdout, running.stderr) if gone == "stdout" else (running.stderr, running.stdout)
        read.readline()
        read.close()
        said = other.read()
    assert (running.returncode, said) == (141, b"")


def test_an_interrupt_is_status_130():
    code = "from kmq_jax.cli import command\ndef stop(): raise KeyboardInterrupt\ncommand.run('x', stop)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_unknown_commands_are_told_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kmq-jax", "scor"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "kmq-jax: unknown command 'scor'; did you mean score? (see kmq-jax --help)\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_a_configuration_is_found_by_its_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = config_flags.parse_flags(
        ["train", "--config=quickstart:smoke", "--workdir=w", "--config.epochs=3.0"]
    )
    assert (config.epochs, config.batch_size, workdir) == (3.0, 8, Path("w"))
    config, _ = config_flags.parse_flags(["train", "--config", "quickstart", "--workdir=w"])
    assert config.batch_size == 32
    with pytest.raises(
        UserError, match=r"--config \(=quickstar\) must be a file, or one of .*paper_resnet200, .*quickstart"
    ):
        config_flags.parse_flags(["train", "--config=quickstar", "--workdir=w"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_settings_of_several_values_are_changed_by_a_flag_or_told_how(tmp_path):
    words = ["train", "--config=so762_resnet36_small", "--workdir=w", "--config.model.blocks=(1, 1, 1, 2)"]
    config, _ = config_flags.parse_flags(words)
    assert config.model.blocks == (1, 1, 1, 2)
    (tmp_path / "mine.py").write_text(
        "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({'model': {'blocks': [1]}})\n"
    )
    with pytest.raises(UserError) as told:
        config_flags.parse_flags(["train", f"--config={tmp_path}/mine.py", "--workdir=w", "--config.model.blocks=(2,)"])
    assert str(told.value) == (
        "--config.model.blocks is a list in the configuration, which no flag can change: let the file say a tuple"
    )


def test_the_configuration_may_stand_behind_what_changes_it():
    for words in (["--config=quickstart:smoke"], ["--config", "quickstart:smoke"]):
        config, _ = config_flags.parse_flags(["train", "--config.seed=7", "--workdir=w", *words])
        assert config.seed == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--config.study.epohs=1", "the configuration has no setting epohs; did you mean epochs?"),
        ("--config.data.trian=x", "the configuration has no setting trian; did you mean train?"),
        ("--config.zz=1", "the configuration has no setting zz"),
        (
            "\u2014\u2014workdir=x",
            "\u2014\u2014workdir=x begins with EM DASH, not with two hyphens; type --workdir=x (see --help)",
        ),
    ],
)
def test_a_mistake_in_a_configuration_is_one_clean_line(word, told):
    with pytest.raises(UserError) as error:
        config_flags.parse_flags(["study", "--config=quickstart", "--workdir=w", word])
    assert str(error.value) == told


def test_a_wheel_and_a_source_tree_hold_the_same_configurations():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(config_flags.configurations())


def test_python_m_runs_the_commands():
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([*PYTHON, "--version"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("kmq-jax ") and done.returncode == 0


def test_a_command_is_a_thin_layer():
    for name in main.COMMANDS:
        lines = (ROOT / "kmq_jax" / "cli" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 80, name


def test_every_flag_that_names_what_is_written_says_so_to_the_check_before_the_work():
    groups = list(BENCHMARKS.values())
    for name in main.COMMANDS:
        groups += getattr(getattr(importlib.import_module(f"kmq_jax.cli.{name}"), "COMMAND", None), "options", ())
    found = [(one, field) for one in groups for field in dataclasses.fields(one)]
    named = {
        f"{one.__name__}.{field.name}": limits_of(field).writes
        for one, field in found
        if kind_of(one, field.name).type is Path and re.match(r"(also )?(write|draw|make)|.* to write\b", _help(field))
    }
    assert len(named) > 8 and all(named.values()), named


def _help(field):
    return limits_of(field).help


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_numbered_settings_are_set_by_flags():
    words = ["study", "--config=quickstart", "--workdir=w", "--config.study.epochs.2=40", "--config.study.epochs.32=.5"]
    config, _ = config_flags.parse_flags(words)
    assert (config.study.epochs["2"], config.study.epochs["32"], config.study.epochs["nested"]) == (40, 0.5, 0)
    for setting in ("study.epochs.9", "study.nothing"):
        with pytest.raises(UserError, match=f"the configuration has no setting {setting.rpartition('.')[2]}"):
            config_flags.parse_flags(["study", "--config=quickstart", "--workdir=w", f"--config.{setting}=1"])


@pytest.mark.parametrize(
    "words", ["--config=voxceleb2_resnet36", "--config voxceleb2_resnet36", "--workdir=v", "-workdir=v"]
)
def test_a_configuration_and_its_directory_are_given_once(words):
    """The last one used to count, in silence. Of a setting it does."""
    flag = re.match("-*([a-z]+)", words)[1]
    with pytest.raises(UserError, match=f"^--{flag} is given twice"):
        config_flags.parse_flags(["train", "--config=quickstart", "--workdir=w", *words.split()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
@pytest.mark.parametrize("words", ["--engine=onnxruntime", "--engine onnxruntime", "-engine onnxruntime"])
def test_a_flag_that_is_short_for_a_setting_takes_its_value_either_way(words):
    short = {"--engine": "--config.study.engine"}
    given = ["study", "--config=quickstart", "--workdir=w", "--config.seed=1", "--config.seed=2", *words.split()]
    config, _ = config_flags.parse_flags(given, short=short)
    assert (config.study.engine, config.seed) == ("onnxruntime", 2)
    with pytest.raises(UserError, match="^--engine is given twice"):
        config_flags.parse_flags([*given, "--engine=jax"], short=short)
