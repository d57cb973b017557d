"""quantize and summarize as commands, and the packed file as a MODEL."""

import json

import jax
import numpy as np
import pytest
from commands import replaced, run

from kmq_jax import quant
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, load_model, save_model

SETTINGS = {"width": 8, "blocks": [1, 1, 1, 1], "embedding_size": 16}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    variables = registry.initialize(registry.build("resnet36", **SETTINGS), jax.random.key(0))
    path = tmp_path_factory.mktemp("original") / "model.kmq"
    save_model(path, SpeakerModel("resnet36", SETTINGS, "kiwano", jax.device_get(variables)))
    return path


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_kernel_has_as_many_values_as_its_width_allows(original, bits, tmp_path, monkeypatch):
    out = tmp_path / "q.kmq"
    assert run(monkeypatch, "quantize", f"--model={original}", f"--bits={bits}", f"--out={out}", "--unfitted") == 0
    params = quant.dequantize_params(load_model(out).variables)["params"]
    kernel = np.asarray(params["stage1"]["block0"]["conv1"]["kernel"]).reshape(-1, 8)
    assert all(len(np.unique(kernel[:, c])) <= 2**bits for c in range(8))
    before = load_model(original).variables["params"]["stage1"]["block0"]["bn1"]
    jax.tree.map(np.testing.assert_array_equal, params["stage1"]["block0"]["bn1"], before)


def test_totals_add_up(original, tmp_path, monkeypatch, capsys):
    out, totals_path = tmp_path / "q.kmq", tmp_path / "t.json"
    run(monkeypatch, "quantize", f"--model={original}", "--bits=2", f"--out={out}", "--skip=stem", "--unfitted")
    assert run(monkeypatch, "summarize", f"--model={out}", f"--json={totals_path}") == 0
    totals = json.loads(totals_path.read_text())
    kernels = [
        leaf.size
        for name, leaf in jax.tree_util.tree_leaves_with_path(load_model(original).variables["params"])
        if "kernel" in str(name) and "stem" not in str(name)
    ]
    assert totals["quantized_weights"] == sum(kernels)
    assert totals["total_bytes"] == totals["index_bytes"] + totals["codebook_bytes"] + totals["other_bytes"]
    assert out.stat().st_size < 1.5 * totals["total_bytes"] + 30_000  # names and shapes are much of so small a model
    shown = capsys.readouterr().out
    assert "stage1/block0/conv1/kernel" in shown and "index bytes" in shown


def test_times_smaller_is_against_four_bytes_a_number_whatever_is_stored(original, tmp_path, monkeypatch, capsys):
    model = load_model(original)
    halves = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.variables)
    save_model(tmp_path / "half.kmq", SpeakerModel("resnet36", SETTINGS, "kiwano", halves))
    out = tmp_path / "q.kmq"
    flags = (f"--model={tmp_path}/half.kmq", "--bits=2", f"--out={out}", "--unfitted")
    assert run(monkeypatch, "quantize", *flags) == 0
    numbers = sum(leaf.size for leaf in jax.tree.leaves(model.variables))
    assert f"{4 * numbers / out.stat().st_size:.1f} times smaller than FP32" in capsys.readouterr().out


def test_a_nested_file_is_read_at_each_of_its_widths(original, tmp_path, monkeypatch):
    out = tmp_path / "q.kmq"
    flags = (f"--model={original}", "--bits=4", "--nested=2,3", "--unfitted", f"--out={out}")
    assert run(monkeypatch, "quantize", *flags) == 0
    for bits, distinct in ((2, 4), (3, 8), (None, 16)):
        loaded = load_model(out, bits)
        kernel = np.asarray(quant.dequantize_params(loaded.variables, bits)["params"]["head"]["linear"]["kernel"])
        assert len(np.unique(kernel[:, 0])) == distinct


def test_rules_decide_by_layer(original, tmp_path, monkeypatch):
    (tmp_path / "rules.json").write_text('[{"pattern": "stage1/", "bits": 4}, {"pattern": "^head", "bits": null}]')
    out = tmp_path / "q.kmq"
    flags = (f"--model={original}", "--bits=2", "--unfitted", f"--out={out}", f"--rules={tmp_path}/rules.json")
    assert run(monkeypatch, "quantize", *flags) == 0
    params = load_model(out).variables["params"]
    assert params["stage1"]["block0"]["conv1"]["kernel"].bits == 4
    assert params["stage2"]["block0"]["conv1"]["kernel"].bits == 2
    assert isinstance(params["head"]["linear"]["kernel"], np.ndarray)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bits=9"], "--bits"),
        (["--bits=2", "--skip=nothing_like_this"], "nothing_like_this"),
        (["--bits=2", "--nested=two"], "--nested (=two)"),
        (["--bits=2", "--model=nowhere"], "nowhere"),
        (["--bits=2", "--data=nowhere"], "nowhere"),
        (["--bits=2", "--granularity=tensor"], "--granularity=tensor needs --unfitted"),
        (["--bits=2", "--recalibrate=nowhere"], "--recalibrate is now --data"),
        (["--bits=2", "--unfitted", "--data=synthetic:dev"], "--data does not go with --unfitted"),
        (["--bits=2", "--unfitted", "--crops=50"], "--crops does not go with --unfitted"),
        (["--bits=2", "--crops=1001"], "--crops (=1001) must be"),
        (["--bits=2", "--activations=8"], "--activations, --budget and --size need --data"),
        (["--budget=3"], "--activations, --budget and --size need --data"),
        (["--bits=2", "--nested=3"], "--nested (=3) must be below --bits (=2)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(original, flags, named, tmp_path, monkeypatch, capsys):
    out = tmp_path / "q.kmq"
    assert run(monkeypatch, "quantize", *replaced([f"--model={original}", f"--out={out}"], flags)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and named in err
    assert not out.exists()


def test_a_quantized_model_is_not_quantized_again(original, tmp_path, monkeypatch, capsys):
    out = tmp_path / "q.kmq"
    run(monkeypatch, "quantize", f"--model={original}", "--bits=4", f"--out={out}", "--unfitted")
    assert run(monkeypatch, "quantize", f"--model={out}", "--bits=2", f"--out={tmp_path}/r.kmq") == 2
    assert "quantized already" in capsys.readouterr().err


def test_without_data_it_is_fitted_on_the_embedded_voices_and_says_so(original, tmp_path, monkeypatch, capsys):
    fitted_on = []
    monkeypatch.setattr(
        "kmq_jax.ptq.quantize.quantize_model", lambda model, rules, data, *more: fitted_on.append(data) or model
    )
    for flags in ([], ["--data=synthetic:dev"], ["--unfitted"]):
        assert run(monkeypatch, "quantize", f"--model={original}", "--bits=2", f"--out={tmp_path}/q.kmq", *flags) == 0
    assert fitted_on == ["synthetic:train", "synthetic:dev", None]
    plain, own, unfitted = capsys.readouterr().out.splitlines()
    assert "fitted on embedded voices (synthetic:train)" in plain
    assert "fitted on crops of synthetic:dev" in own and "not fitted" in unfitted


def test_a_kernel_that_would_not_shrink_stays_as_it_is(original, tmp_path, monkeypatch):
    out = tmp_path / "q.kmq"
    assert run(monkeypatch, "quantize", f"--model={original}", "--bits=8", f"--out={out}", "--unfitted") == 0
    kept, before = load_model(out).variables["params"], load_model(original).variables["params"]
    # Nine weights in float32 take 36 bytes a channel; a codebook of 8 bits alone takes 512.
    np.testing.assert_array_equal(kept["stem"]["conv"]["kernel"], before["stem"]["conv"]["kernel"])
