"""The run on an accelerator in tiny sizes: parts give their figures, and one that is cut off costs no other."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmq_jax.benchmarks import accelerator
from kmq_jax.benchmarks.accelerator import device, feeding, lines, report, steps
from kmq_jax.benchmarks.options import PARTS, AcceleratorBench
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch, compiled):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))


def run(out, *flags):
    bench.run("accelerator", [f"--out={out}", "--tiny", *flags])
    return lines.read(out)


def test_every_part_has_a_module_and_a_limit():
    assert list(accelerator.MODULES) == list(PARTS)
    assert [name for name, _ in AcceleratorBench().plan] == list(PARTS)
    assert AcceleratorBench().plan[0][1] >= 240  # the first part compiles with an empty cache


def script(tmp_path, *flags, limit=60):
    """Runs launch/gpu_check.sh from another directory, as on a bare machine."""
    out = str(tmp_path / "new/figures.jsonl")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": out, "LIMIT": str(limit)}
    command = ["bash", ROOT / "launch" / "gpu_check.sh", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


MAIN = {
    ("step", "whole"): "examples_per_second",
    ("step", "network"): "examples_per_second",
    ("qat", "kmqat 4 bits"): "ratio",
    ("qat", "kmqat 2 bits"): "ratio",
    ("qat", "4 bits"): "ratio",
    ("input", "beside the step"): "slowdown_by_input",
    ("extract", "resnet36"): "times_real_time",
    ("extract", "wespeaker_resnet34"): "times_real_time",
    ("trials", "cosine"): "seconds",
    ("trials", "as-norm"): "seconds",
    ("trials", "cascade"): "seconds",
    ("kmeans", "4 bits"): "seconds",
    ("step200", "whole"): "examples_per_second",
    ("step200", "whole, recomputed but for statistics"): "examples_per_second",
    ("step200", "whole, recomputed but for convolutions"): "examples_per_second",
    ("remat", "whole, recomputed but for statistics"): "examples_per_second",
}
"""The main figure of what every part measures; PyTorch's stands apart, as it may not be installed."""


def check_every_part(rows):
    """No part failed, and each wrote its main figures."""
    assert not [row for row in rows if "error" in row] and all(row["tiny"] for row in rows)
    assert {row["part"] for row in rows} == set(PARTS)
    found = {(row["part"], row["what"]): row for row in rows}
    for place, figure in MAIN.items():
        assert found[place][figure] > 0, place
    torch = found.get(("torch", "not installed")) or found["torch", "eager"]
    assert torch["what"] == "not installed" or torch["examples_per_second"] > 0
    whole = [row for row in rows if row["what"].startswith("whole") and "loss" in row]
    assert all(row["program_memory_gb"] > 0 and row["xla_tflop_per_step"] > 0 for row in whole)
    assert found["qat", "kmqat 4 bits"]["reassigning_step_seconds"] > 0
    assert found["qat", "4 bits"]["reassigning_step_seconds"] is None  # this project's recipe assigns in every step


@pytest.mark.slow
def test_the_script_runs_every_part_end_to_end_in_tiny_sizes(tmp_path):
    generous = ",".join(f"{name}:3600" for name in PARTS)  # a part's own limit is that of a machine with an accelerator
    done = script(tmp_path, "--tiny", f"--parts={generous}", limit=7200)
    assert done.returncode == 0, done.stderr
    check_every_part(lines.read(tmp_path / "new" / "figures.jsonl"))
    assert "not finished" not in done.stdout


def seconds_on_record(part):
    """What a part took in the committed lines, which were made with an empty cache: the longest of its runs."""
    rows = lines.read(ROOT / ".github/results/accelerator-h200.jsonl")
    return max(row.get("after_seconds", 0.0) for row in rows if row["part"] == part)


def test_with_an_empty_cache_every_part_of_the_list_begins_in_time():
    begin, began = 0.0, {}
    for name, limit in AcceleratorBench().plan[:-1]:  # `remat` is beyond the list, and has never been timed
        began[name] = begin
        begin += min(limit, seconds_on_record(name))
    assert max(began.values()) < AcceleratorBench().limit - accelerator._LEAST


def running(directory):
    """Processes that were started for the figures in a directory."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if f"--out={directory}" in line]


@pytest.mark.slow
def test_a_script_that_is_told_to_end_ends_its_part(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "figures.jsonl")}
    command = ["bash", ROOT / "launch" / "gpu_check.sh", "--tiny", "--parts=step"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        while not any("--part=step" in line for line in running(tmp_path)):
            assert child.poll() is None
            time.sleep(0.2)
        child.terminate()
        assert child.wait(60) == 143
    assert not running(tmp_path)


@pytest.mark.slow
def test_a_part_that_is_cut_off_leaves_a_line_and_the_rest_goes_on(tmp_path):
    out = tmp_path / "new" / "figures.jsonl"
    done = script(tmp_path, "--tiny", "--parts=step:1,trials")
    assert done.returncode == 0, done.stderr
    rows = lines.read(out)
    assert rows[0] == {"part": "step", "error": "stopped after 1 s"}
    figures = {row["what"]: row for row in rows[1:]}
    assert set(figures) == {"cosine", "as-norm", "cascade"}
    assert figures["cosine"]["greatest_difference"] < 1e-6
    assert figures["as-norm"]["greatest_difference_of_statistics"] < 1e-5
    assert "stopped after 1 s" in done.stdout and "adds them with --parts=step\n" in done.stdout
    again = run(out, "--parts=trials,kmeans", "--limit=0.5")  # lines are added; what has no time left says so
    assert again[: len(rows)] == rows
    assert [row["error"] for row in again[len(rows) :]] == ["not begun: no time left"] * 2


@pytest.mark.slow
def test_a_step_is_fed_and_timed(tmp_path):
    out = tmp_path / "figures.jsonl"
    feeding.run_input(lines.Log(out, "input"), AcceleratorBench(out=out, tiny=True))
    figures = {row["what"]: row for row in lines.read(out)}
    assert figures["alone, 1 threads"]["examples_per_second"] > 0
    assert figures["beside the step"]["waiting_seconds"] >= 0 and figures["beside the step"]["batch"] == 4
    step = steps.make(steps.configure(steps.NETWORK, 4, tiny=True), tiny=True)  # compiled by the part before
    whole = steps.figures_of(step, device.seconds_of(step, 0.1))
    assert whole["share_of_peak"] is None and whole["examples_per_second"] > 0 and not whole["remat"]


def test_a_part_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
    (row,) = run(tmp_path / "figures.jsonl", "--parts=trials")
    assert "ended with status" in row["error"] and "nonesuch" in row["error"]


def test_the_table_is_read_back(tmp_path, capsys):
    out = tmp_path / "figures.jsonl"
    card = {"card": "NVIDIA H100 80GB HBM3", "jax": "0.11.2"}
    shares = {"share_of_peak": 0.48, "share_of_peak_by_xla": 0.47}
    lines.append(out, {"part": "step", "what": "whole", **card, **shares, "step_seconds": 0.16})
    lines.append(out, {"part": "qat", "what": "4 bits", **card, "ratio": 1.09})
    lines.append(out, {"part": "qat", "what": "kmqat 4 bits", **card, "ratio": 1.08})
    lines.append(out, {"part": "input", "what": "beside the step", **card, "slowdown_by_input": 1.01})
    lines.append(out, {"part": "torch", "error": "stopped after 110 s"})
    run(out, f"--table={out}")
    shown = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, jax 0.11.2" in shown and "160.0 ms a step, 48.0 % of peak, 47.0 % by XLA's" in shown
    goals = [line.partition("goal     ")[2] for line in shown.splitlines() if line.startswith("goal")]
    assert goals == [
        "share of peak by XLA's count: 0.470, at least 0.45: met",
        "KMQAT at 4 bits over full precision: 1.080, at most 1.05: NOT met",  # as published, not our recipe's 1.09
        "never waiting for input: fed over unfed steps: 1.010, at most 1.02: met",
    ]
    assert "stopped after 110 s" in shown
    large = [{**row, "card": "NVIDIA H200"} for row in lines.read(out) if "card" in row]
    assert report.table(large).count("goal") == 3  # its peak is an H100's
    other = [{**row, "card": "NVIDIA L4"} for row in lines.read(out) if "card" in row]
    assert "goal" not in report.table(other)  # goals are one card's


@pytest.mark.parametrize("parts", ["stepp", "step:0", "step:soon"])
def test_a_wrong_part_is_named(parts, tmp_path):
    with pytest.raises(UserError, match=f"--parts: '{parts}"):
        run(tmp_path / "figures.jsonl", f"--parts={parts}")


def test_peaks_are_found_by_the_names_of_cards():
    assert device.peak_flops("NVIDIA H100 80GB HBM3") == device.peak_flops("NVIDIA H200") == 989e12
    assert device.peak_flops("NVIDIA L4") == 121e12 and device.peak_flops("NVIDIA L40") is None
    assert device.peak_flops("TPU v5 lite") == 197e12 and device.peak_flops("TPU v5p") == 459e12
    assert device.peak_flops("cpu") is None


def test_the_script_passes_its_flags_on(tmp_path):
    done = script(tmp_path, "--parts=nonesuch")
    assert done.returncode == 2 and "'nonesuch' must be one of step" in done.stderr


def test_a_conversion_is_no_convolution():
    found = device.by_sort({"loop_convert_fusion": (1.0, 1), "sm80_conv2d": (2.0, 1), "input_convert_reduce": (4.0, 1)})
    assert found == {"elementwise": 1.0, "convolutions": 2.0, "reductions": 4.0}


def test_figures_are_known_from_runs_on_such_a_card_in_such_sizes_alone(tmp_path):
    out = tmp_path / "figures.jsonl"
    full, tiny = lines.Log(out, "step"), lines.Log(out, "step", tiny=True)
    assert full.known("step", "whole", "batch") is None
    full.write("whole", batch=256)
    full.write("whole", card="NVIDIA L4", batch=64)
    tiny.write("whole", batch=4)
    lines.append(out, {"part": "step", "error": "stopped after 1 s"})
    assert full.known("step", "whole", "batch") == 256 and tiny.known("step", "whole", "batch") == 4
    assert full.known("step", "whole", "batch", "NVIDIA L4") == 64
    assert full.known("step", "whole", "loss") is None


def test_half_a_line_costs_no_other(tmp_path):
    out = tmp_path / "figures.jsonl"
    whole = {"part": "step", "what": "whole", "card": "c", "jax": "1", "batch": 8}
    lines.append(out, whole)
    with out.open("a") as file:
        file.write('{"part": "qat", "what"')  # killed while it wrote
    lines.append(out, {"part": "qat", "error": "stopped after 1 s"})
    assert lines.read(out) == [whole, {"part": "qat", "error": "stopped after 1 s"}]


def test_a_file_without_figures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^--table \(=.*README.md\) holds no figures of this benchmark"):
        run(tmp_path / "figures.jsonl", f"--table={ROOT / 'README.md'}")


def test_what_parts_say_stands_in_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "command_of", lambda name, options: [sys.executable, "-c", "print('said')"])
    for name in ("a.log", "a.jsonl"):
        out = tmp_path / name
        assert accelerator.run_part("step", 60, AcceleratorBench(out=out)) == "" and not out.exists()
