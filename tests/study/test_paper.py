"""What is published of a training, beside the settings that the paper's configurations train with."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from kmq_jax.cli.main import run
from kmq_jax.core.errors import UserError
from kmq_jax.study import paper, study_tables, tables
from kmq_jax.study.options import StudyOptions
from kmq_jax.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
STEPS = ("fp32", "kmqat-4", "kmqat-3", "kmqat-2", "kmqat-mixed")


def beside(step, name="paper_resnet36", **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return paper.settings_beside(config, StudyOptions.of(json.loads(config.to_json())["study"]), step)["rows"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["paper_resnet36", "paper_resnet200"])
def test_every_line_is_equal_or_has_its_reason(name, step):
    rows = beside(step, name)
    assert rows and all(row["equal"] or row["why"] for row in rows)
    differing = [row["setting"] for row in rows if row["equal"] is False]
    assert differing == ([] if step == "fp32" else ["quant.granularity"])


def test_a_setting_that_differs_is_told():
    (row,) = [row for row in beside("fp32", **{"optimizer.weight_decay": 1e-4}) if row["setting"].endswith("_decay")]
    assert (row["published"], row["here"], row["equal"]) == (2e-4, 1e-4, False)
    shown = study_tables.settings_table({"rows": [row]})
    assert "| `0.0002` | `0.0001` | **differs**: 1e-4 in the code" in shown


def test_every_line_names_a_test_that_there_is():
    for row in [row for step in STEPS for row in beside(step)]:
        file, _, name = row["test"].partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row["test"]


def test_every_setting_is_an_option():
    options = TrainOptions(model={"name": "resnet18"})
    for line in (*paper.FP32, *paper.KMQAT, *paper.MIXED_LINES):
        if line.setting and "[" not in line.setting:
            paper.value_of(options, line.setting)
        assert line.source in (paper.PAPER, paper.CODE, paper.OPEN)
    assert paper.value_of(options, "optimizer.groups[nothing].peak") is None


@pytest.mark.parametrize("step", ["fp32", "kmqat-2", "kmqat-mixed"])
def test_the_page_is_what_the_configuration_says_today(step):
    committed = json.loads((ROOT / f".github/results/paper-{step}.json").read_text())
    assert committed["rows"] == json.loads(json.dumps(beside(step)))
    page = (ROOT / "configs/PAPER.md").read_text()
    assert tables.fill(page, ROOT / "configs") == page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_the_command_prints_the_lines_and_writes_them(tmp_path, monkeypatch, capsys):
    words = ["--config=paper_resnet36", f"--workdir={tmp_path}", "--settings=kmqat-2"]
    monkeypatch.setattr("sys.argv", ["kmq-jax study", *words])
    with pytest.raises(SystemExit) as ended:
        run("study")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert re.search(r"\| retention 0.9 \| paper \| `quant.retention` \| `0.9` \| `0.9` \| equal \|", shown)
    found = json.loads((tmp_path / "settings-kmqat-2.json").read_text())
    assert shown == study_tables.settings_table(found) and len(found["rows"]) == len(paper.KMQAT)


def test_mistakes():
    with pytest.raises(UserError, match=r"--settings \(=kmqat-5\) must be of fp32, kmqat-4, kmqat-3, kmqat-2, kmqat-m"):
        beside("kmqat-5")
