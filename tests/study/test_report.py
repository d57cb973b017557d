"""What the report of a study makes of its results."""

import json
import shlex
from pathlib import Path

import jinja2
import pytest

from kmq_jax import html
from kmq_jax.cli import quantize
from kmq_jax.cli.flags import options_of
from kmq_jax.ptq.options import QuantizeOptions
from kmq_jax.ptq.quantize import rules_of as read_rules
from kmq_jax.study import report


def cascade(name, saved, flips, alone):
    levels = {bits: {"harmful_flip_rate": rate} for bits, rate in alone.items()}
    found = {"saved": {"utterance": saved}, "harmful_flip_rate": flips, "each_level_alone": levels}
    return {"name": name, "sets": {"dev": found}}


def test_only_a_cascade_that_gains_over_each_of_its_levels_is_headlined():
    levels = {"2": 0.05, "4": 0.01}
    dear = cascade("costs more than 4 bits", -0.1, 0.0, levels)
    idle = cascade("decides as 2 bits do", 0.5, 0.05, levels)
    some, more = cascade("saves some", 0.2, 0.02, levels), cascade("saves more", 0.3, 0.03, levels)
    assert report.headlined([dear, idle], "dev") is None and report.headlined([], "dev") is None
    assert report.headlined([dear, some, idle, more], "dev") is more


def test_rules_to_paste_are_those_that_quantize_reads(tmp_path, monkeypatch):
    rules = [{"pattern": "^stem/conv/kernel$", "bits": 3}, {"pattern": "", "bits": 2}]
    directory = tmp_path / "diagnosis" / "dev"
    directory.mkdir(parents=True)
    (directory / "rules-2.json").write_text(json.dumps(rules))
    summary = {"diagnosis": {"dev": {"directory": "diagnosis/dev"}}}
    (found,) = report.rules_of(tmp_path, summary, "fp32", "synthetic:train?speakers=8&utterances=4")
    assert json.loads(found["text"]) == rules and found["bits"] == "2"
    words = shlex.split(found["command"])
    assert words[:2] == ["kmq-jax", "quantize"] and "--data=synthetic:train?speakers=8&utterances=4" in words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words[1:])
    assert "--model=fp32" in words  # imported: it lies where the user said
    options = options_of(QuantizeOptions, quantize.COMMAND.parse())
    assert [rule.pattern for rule in read_rules(options)][:2] == [rule["pattern"] for rule in rules]


def test_a_command_to_paste_runs_where_the_study_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Path("runs/study")
    (workdir / "diagnosis" / "dev").mkdir(parents=True)
    (workdir / "diagnosis" / "dev" / "rules-2.json").write_text("[]")
    (workdir / "fp32.kmq").write_text("")
    summary = {"diagnosis": {"dev": {"directory": "diagnosis/dev"}}}
    (found,) = report.rules_of(workdir, summary, "fp32.kmq", "data/train")
    given = dict(word.split("=", 1) for word in shlex.split(found["command"])[2:])
    assert Path(given["--model"]).is_file() and Path(given["--rules"]).is_file() and given["--data"] == "data/train"
    assert (workdir / found["file"]).is_file()  # the page names it beside itself


def test_learning_curves_are_drawn_by_way_of_training(tmp_path):
    def log(name, *lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    told = [{"step": step, "epoch": step / 2, "loss": 3.0 - step / 2} for step in (1, 2, 4)]
    log("fp32", *told[:2], {"step": 2, "validation_eer": 7.0}, told[2], {"step": 4, "validation_eer": 5.0})
    log("distilled-2", *told)
    log("distilled-nested", *told[:2])
    rows = [{"model": name} for name in ("fp32", "ptq-2.kmq", "distilled-2", "distilled-nested", "distilled-nested")]
    full, quantized, validated = report.learning_figure(tmp_path, rows).axes
    assert [line.get_xdata().tolist() for line in full.lines] == [[0.5, 1.0, 2.0]]
    assert [line.get_ydata().tolist() for line in full.lines] == [[2.5, 2.0, 1.0]]
    assert [text.get_text() for text in quantized.get_legend().get_texts()] == ["2 bits", "nested"]
    (eers,) = validated.lines
    assert eers.get_xdata().tolist() == [1.0, 2.0] and eers.get_ydata().tolist() == [7.0, 5.0]
    assert report.learning_figure(tmp_path, [{"model": "ptq-2.kmq"}]) is None
    # A network that was trained elsewhere has a log of its own, which is not of this study.
    assert report.learning_figure(tmp_path / "study", [{"model": str(tmp_path / "fp32")}]) is None


def test_the_page_tells_flips_as_shares_of_all_trials():
    environment = jinja2.Environment(loader=jinja2.PackageLoader("kmq_jax.html", "."))
    source = environment.loader.get_source(environment, "study.html.j2")[0]
    (line,) = (line for line in source.splitlines() if line.startswith("<p>The cascade {{ headlined.name }}"))
    environment.filters |= {"percent": html.percent, "number": html.number}
    levels = {"2": {"harmful_flip_rate": 0.02}}
    there = {"harmful_flip_rate": 0.005, "resolved": {"2": 0.75}, "each_level_alone": levels}
    there |= {"saved": {"utterance": 0.5}}
    cascade = {"name": "2>4", "bits": [2, 4], "sets": {"dev": there}}
    page = environment.from_string(line).render(headlined=cascade, there=there, calibrated="dev", sets=["dev"])
    # The rate counts all trials, not only those that full precision decides rightly.
    assert "On 0.50 % of all trials it is wrong where full precision is right" in page


@pytest.mark.parametrize(("eers", "scale"), [([2.0, 2.2, 4.0], "linear"), ([2.0, 2.5, 44.0], "log")])
def test_one_bad_network_does_not_hide_the_others(eers, scale):
    rows = [
        {"bits": bits, "method": method, "sets": {"dev": {"eer": eer}}}
        for bits, method, eer in zip((32, 4, 2), ("full precision", "trained", "trained"), eers)
    ]
    (axes,) = report.bits_figure({"rows": rows}, ["dev"]).axes
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] < min(eers) and axes.get_ylim()[1] > max(eers)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "2"]


def test_every_tick_of_bits_has_a_network():
    made = {
        "full precision": 32,
        "trained": 2,
        "trained, mixed": 3.144,
        "trained, full precision": 32,
        "trained, kmqat": 2,
    }
    rows = [{"bits": bits, "method": name, "sets": {"dev": {"eer": 3.0}}} for name, bits in made.items()]
    (axes,) = report.bits_figure({"rows": rows}, ["dev"]).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3.144", "2"]
    places = [round(x) for drawn in axes.containers for x in drawn.lines[0].get_xdata()]
    assert sorted(places) == [0, 1, 1]
