"""The names at the top level, and what they do together."""

import ast
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kmq_jax

PARAMS = {
    "dense": {
        "kernel": np.random.default_rng(0).standard_normal((48, 8)).astype(np.float32),
        "bias": np.ones(8, np.float32),
    }
}


def test_training_through_codebooks_from_the_top_level():
    latents, books = kmq_jax.init_codebooks(PARAMS, {"kernel$": 2})
    x, wanted = np.eye(48, dtype=np.float32), 2 * PARAMS["dense"]["kernel"]

    @jax.jit
    def loss(trained):
        weights = kmq_jax.fake_quantize(*trained)
        return jnp.mean((x @ weights["dense"]["kernel"] - wanted) ** 2)

    trained, optimizer = (latents, books), optax.adam(0.05)
    state, before = optimizer.init(trained), loss(trained)
    for _ in range(20):
        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        trained = optax.apply_updates(trained, updates)
    assert loss(trained) < 0.8 * before
    packed, weights = kmq_jax.pack(*trained), kmq_jax.fake_quantize(*trained)
    assert isinstance(packed["dense"]["kernel"], kmq_jax.CodebookTensor)
    jax.tree.map(np.testing.assert_array_equal, kmq_jax.dequantize_params(packed), weights)
    floating, rest = kmq_jax.partition(packed)
    assert jax.tree.structure(kmq_jax.combine(floating, rest)) == jax.tree.structure(packed)


def test_completion_and_editors_see_every_name():
    names = {"quantize_params", "dequantize_params", "init_codebooks", "fake_quantize", "pack", "load", "SpeakerModel"}
    assert names <= set(dir(kmq_jax)) and set(kmq_jax.__all__) <= set(dir(kmq_jax))
    tree = ast.parse(inspect.getsource(kmq_jax))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: (line.module, name.name) for line in block.body for name in line.names}
    assert seen == kmq_jax._HOMES
    for name in kmq_jax.__all__:
        assert getattr(kmq_jax, name) is not None


def test_importing_the_package_is_light():
    code = "import sys, kmq_jax; dir(kmq_jax); print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
