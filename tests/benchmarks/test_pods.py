"""Training on paper: what a program sends, and what follows from it."""

import json

import jax
import pytest

from kmq_jax.benchmarks import pods
from kmq_jax.cli import bench
from kmq_jax.models import registry

PROGRAM = """
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %dot), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce.2 = (bf16[16]{0}, f32[]) all-reduce(bf16[16]{0} %a, f32[] %b), channel_id=2, to_apply=%add
  %all-gather.1 = u8[32]{0} all-gather(u8[16]{0} %c), channel_id=3, dimensions={0}
  ROOT %add = f32[8,4]{1,0} add(f32[8,4]{1,0} %all-reduce.1, f32[8,4]{1,0} %d)
"""


def test_collectives_are_counted_by_what_they_give_out():
    assert pods.collective_bytes(PROGRAM) == {"all-reduce": 128 + 32 + 4, "all-gather": 32}


def test_one_chip_sends_nothing_and_more_chips_do_more():
    one, many = (
        pods.estimate(pods.System("s", chips, 1e12, 1e9), flops=1e12, sent=1e9, batch=4, samples=100, share=1.0)
        for chips in (1, 100)
    )
    assert one.reduce == 0 and one.step_bounds == (1.0, 1.0) and one.examples_per_second == 4
    assert many.reduce == pytest.approx(1.98) and many.examples_per_second == pytest.approx(400 / 2.98)
    assert many.input_bytes_per_second == pytest.approx(many.examples_per_second * 320)


def test_the_gradients_of_every_parameter_are_reduced(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # the devices of this process are there already: four of them
    bench.run("pods", ["--tiny", f"--json={tmp_path / 'p.json'}"])
    found = json.loads((tmp_path / "p.json").read_text())
    network = registry.build("resnet36", **registry.smoke_settings("resnet36"))
    leaves = registry.shapes(network)["params"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(leaves))
    classifier = pods.CLASSES * registry.smoke_settings("resnet36")["embedding_size"]
    assert found["sent_bytes"]["all-reduce"] >= 4 * (weights + classifier)
    assert found["sent_bytes"]["all-reduce"] < 1.5 * 4 * (weights + classifier) + 1e6
    assert "TPU v5p-64" in capsys.readouterr().out
