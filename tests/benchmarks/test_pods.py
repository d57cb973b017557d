"""Training on paper: what a program sends, and what follows from it."""

import json

import jax
import pytest

from kmq_jax.benchmarks import pods
from kmq_jax.benchmarks.accelerator import extraction
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.study import tables

PROGRAM = """
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %dot), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce.2 = (bf16[16]{0}, f32[]) all-reduce(bf16[16]{0} %a, f32[] %b), channel_id=2, to_apply=%add
  %all-gather.1 = u8[32]{0} all-gather(u8[16]{0} %c), channel_id=3, dimensions={0}
  ROOT %add = f32[8,4]{1,0} add(f32[8,4]{1,0} %all-reduce.1, f32[8,4]{1,0} %d)
"""


SENT = {"all-reduce": 10**9}


def test_collectives_are_counted_by_what_they_give_out():
    assert pods.collective_bytes(PROGRAM) == {"all-reduce": 128 + 32 + 4, "all-gather": 32}


def test_a_part_of_a_reduce_scatter_is_one_of_all_devices():
    # Both halves of an all-reduce, by themselves.
    halves = {"reduce-scatter": 100, "all-gather": 400}
    assert pods.ring_bytes(halves, 16, simulated=4) == pods.ring_bytes({"all-reduce": 400}, 16, simulated=4)


def test_one_chip_sends_nothing_and_more_chips_do_more():
    one, many = (
        pods.estimate(pods.System("s", chips, 1e12, 1e9, 1e9, 1e9), pods.Work(1.0), 2.5e11, SENT, batch=4, simulated=4)
        for chips in (1, 100)
    )
    assert one.send == 0 and one.step_bounds == (1.0, 1.0) and one.examples_per_second == 4
    assert many.send == pytest.approx(1.98) and many.examples_per_second == pytest.approx(400 / 2.98)
    # A crop of 3.5 s, and interference for three of five: far less than whole records, of which babble reads five.
    assert many.input_bytes_per_second == pytest.approx(many.examples_per_second * 2.4 * 8 * 32000)


def test_a_record_is_as_long_as_those_that_are_extracted():
    assert pods.RECORD_BYTES == 2 * extraction.RATE * extraction.SECONDS


def test_a_chip_takes_as_many_examples_as_its_memory_holds():
    system = pods.System("s", 8, 1e12, 1e9, 1e9, 16e9)
    works = [pods.Work(0.5, 0.0, held) for held in (None, 5e7, 2e8, 9e9)]
    sizes = [pods.estimate(system, work, 1e9, SENT, 256, 4).batch for work in works]
    assert sizes == [256, 256, 64, 1]


CARD = {"card": "NVIDIA H200", "model": "resnet36", "batch": 100, "step_seconds": 0.5}
STEP = {"part": "step", "what": "whole", **CARD, "remat": False, "xla_tflop_per_step": 100.0,
        "peak_tflop_per_second": 1000.0, "peak_memory_gb": 40.0}  # fmt: skip
KERNELS = {"part": "step", "what": "whole kernels", "card": "NVIDIA H200",
           "milliseconds": {"convolutions": 60.0, "products": 20.0, "elementwise": 20.0}}  # fmt: skip


def test_what_a_chip_does_is_read_off_a_timed_step():
    work = pods.work_of([STEP, KERNELS], "resnet36", remat=False)
    assert work.share == pytest.approx(0.25)  # 100 TFLOP in four fifths of half a second, of 1,000 TFLOP/s
    assert work.passes == pytest.approx(0.1 * 4.8e12 / 100) and work.held == pytest.approx(0.4e9)
    assert pods.work_of([STEP, KERNELS], "resnet36", remat=True).held is None  # no such step was timed
    with pytest.raises(UserError, match="no step of resnet200 was timed"):
        pods.work_of([STEP, KERNELS], "resnet200", remat=False)
    with pytest.raises(UserError, match="bandwidth of NVIDIA L4"):
        pods.work_of([{**STEP, "card": "NVIDIA L4"}, KERNELS], "resnet36", remat=False)


def run(tmp_path, monkeypatch, *flags):
    monkeypatch.setenv("XLA_FLAGS", "")  # the devices of this process are there already: four of them
    bench.run("pods", ["--tiny", "--batch=2", f"--json={tmp_path / 'p.json'}", *flags])
    return json.loads((tmp_path / "p.json").read_text())


def parameters():
    """Parameters of the tiny network, and numbers of its embedding."""
    settings = registry.smoke_settings("resnet36")
    leaves = registry.shapes(registry.build("resnet36", **settings))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(leaves)), settings["embedding_size"]


def test_the_gradients_of_every_parameter_are_reduced(tmp_path, capsys, monkeypatch):
    lines = tmp_path / "a.jsonl"
    lines.write_text(f"{json.dumps(STEP)}\n{json.dumps(KERNELS)}\n")
    found = run(tmp_path, monkeypatch, f"--measured={lines}")
    weights, size = parameters()
    classifier = pods.CLASSES * size
    assert found["sent_bytes"]["all-reduce"] >= 4 * (weights + classifier)
    assert found["sent_bytes"]["all-reduce"] < 1.5 * 4 * (weights + classifier) + 1e6
    assert set(found["sent_bytes"]) == {"all-reduce"}  # neither waves nor features
    assert found["share"] == pytest.approx(0.25) and found["flops"] > 0
    assert [one["system"] for one in found["systems"]] == [system.name for system in pods.SYSTEMS]
    assert "TPU v5p-64" in capsys.readouterr().out
    (tmp_path / "p.jsonl").write_text(json.dumps(found) + "\n")
    filled = tables.fill("<!-- table: p.jsonl pods -->\n<!-- end -->", tmp_path).splitlines()
    assert filled[3].startswith("| resnet36, tiny | TPU v5e-16 | 2 | ") and len(filled) == 9


def test_the_gradients_of_a_classifier_that_is_split_are_not(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch, "--sharding=classifier")
    weights, size = parameters()
    sent = found["sent_bytes"]
    assert found["sharding"] == "classifier"
    # Those of the network are: each device does its own part of the batch, not all of it.
    assert 4 * weights <= sent["all-reduce"] < 4 * (weights + pods.CLASSES * size)
    assert sent.keys() - {"all-reduce"}  # embeddings, or the classifier, are handed round
