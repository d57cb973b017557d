"""The README's five lines, on models that are not speaker networks."""

import re
from pathlib import Path

import numpy as np

import kmq_jax.quant

README = Path(__file__).parents[2] / "README.md"


def test_the_five_lines_run(capsys):
    code = re.search(r"in five lines:\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) == 5
    names = {}
    exec(code, names)  # the project's own text
    exact = np.asarray(names["model"].apply(names["params"], names["x"]))
    assert np.linalg.norm(names["y"] - exact) < 0.25 * np.linalg.norm(exact)
    before, after = (int(number) for number in re.findall(r"\d+", capsys.readouterr().out))
    assert after < before / 1.5  # tiny layers: codebooks are as large as indices


def test_quantization_aware_training_of_it():
    section = README.read_text().split("## In Python")[1]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    names = {}
    exec(first + second, names)  # the project's own text
    kernel = names["gradients"]["params"]["layers_0"]["kernel"]
    assert np.isfinite(kernel).all() and np.any(kernel)
    exact = kmq_jax.fake_quantize(names["latents"], names["books"])["params"]["layers_0"]["kernel"]
    np.testing.assert_array_equal(names["packed"]["params"]["layers_0"]["kernel"], exact)


def test_plain_tree():
    weights = {"in": np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32), "scales": [np.ones(16)]}
    rules = [kmq_jax.quant.QuantRule("in", kmq_jax.quant.QuantSpec(bits=2))]
    restored = kmq_jax.quant.dequantize_params(kmq_jax.quant.quantize_params(weights, rules))
    assert all(len(np.unique(column)) == 4 for column in restored["in"].T)
