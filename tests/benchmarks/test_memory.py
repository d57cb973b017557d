"""The paper's memory table, and what half precision of biases costs, as their benchmarks tell them."""

import json

import jax
import pytest

from kmq_jax.benchmarks import biases, memory
from kmq_jax.benchmarks.options import BiasesBench, MemoryBench
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.study import tables


@pytest.mark.slow
def test_every_cell_of_both_networks_is_the_published_one_with_half_biases_alone(tmp_path):
    memory.main(MemoryBench(json=tmp_path / "m.json"))
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert len(rows) == 17 and all(row["equal"] for row in rows)
    assert {(row["network"], row["bits"]) for row in rows} == {
        (n, b) for n in ("resnet36", "resnet200") for b in (2, 3, 4, 32)
    }
    # 4,992 biases of two bytes more.
    half, single = (memory.counted(memory.packed("resnet36", 2, kind))[memory.WITH] for kind in ("float16", "float32"))
    assert single - half == 2 * 4992 and f"{single / memory.MIB:.3f}" != "9.706"
    filled = tables.fill("<!-- table: m.json memory -->\n<!-- end -->", tmp_path)
    assert "| resnet36 | 4 | indices | 7.102 | 7.102 | equal |" in filled and "differs" not in filled


def test_biases_in_half_precision_change_almost_nothing(tmp_path, capsys):
    network = registry.build("wespeaker_resnet18", **registry.smoke_settings("wespeaker_resnet18"))
    variables = registry.initialize(network, jax.random.key(0))
    settings = registry.smoke_settings("wespeaker_resnet18")
    save_model(tmp_path / "full.kmq", SpeakerModel("wespeaker_resnet18", settings, "wespeaker", variables))
    voices = "synthetic:dev?speakers=4&utterances=2"
    model, out = str(tmp_path / "full.kmq"), tmp_path / "b.json"
    options = BiasesBench(
        model=model, data=(voices,), trials=(voices,), bits=(2,), engine="jax", replicates=20, json=out
    )
    biases.main(options)
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    one = row["sets"][voices]
    assert row["bytes_half"] < row["bytes"] and 0.9999 < one["min_cosine"] < 1.00001
    assert one["eer_half"] - one["eer"] == pytest.approx(one["eer_change"]) and one["speakers"] == 4
    assert "least cosine" in capsys.readouterr().out
    assert "bits" in tables.fill("<!-- table: b.json biases -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match="must be one for each of 1 --data"):
        BiasesBench(model="m", fit="d", data=("a",), trials=())
