"""Counts of the published networks, settings and their errors, components, deterministic start."""

import re

import jax
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import registry, walk
from kmq_jax.nn.conv import window
from kmq_jax.nn.layers import KAIMING_NORMAL, TORCH_DEFAULT

NARROW = {"width": 4, "features": 16, "embedding_size": 8, "blocks": [1, 1, 1, 1]}

# Other tests register networks of their own in the same process.
SHIPPED = [name for name in registry.names() if name.startswith(("resnet", "wespeaker_"))]


def weights(model) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: leaf for name, leaf in named_leaves(registry.shapes(model)["params"]) if name.endswith("kernel")}


def sizes(model, pattern: str) -> int:
    return sum(leaf.size for name, leaf in named_leaves(registry.shapes(model)["params"]) if re.search(pattern, name))


@pytest.mark.parametrize(
    ("name", "tensors", "count", "output_channels", "biases", "norm_channels"),
    [("resnet36", 53, 14_894_208, 12_160, 4_992, 13_056), ("resnet200", 259, 59_835_520, 51_200, None, None)],
)
def test_counts_behind_the_published_memory_table(name, tensors, count, output_channels, biases, norm_channels):
    model = registry.build(name)
    kernels = weights(model)
    assert len(kernels) == tensors
    assert sum(leaf.size for leaf in kernels.values()) == count
    assert sum(leaf.shape[-1] for leaf in kernels.values()) == output_channels
    if biases:
        assert sizes(model, r"(fc\d|attention\d|linear)/bias$") == biases
        assert sizes(model, "scale$") == norm_channels
        assert registry.parameter_count(model) == count + biases + 2 * norm_channels


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 8.04), ("resnet36", 14.93), ("resnet50", 15.64), ("resnet101", 36.83), ("resnet200", 59.94)],
)
def test_published_parameter_counts(name, millions):
    assert round(registry.parameter_count(registry.build(name)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "digits", "giga"),
    [
        ("resnet18", 1, 22.4),
        ("resnet36", 2, 41.15),
        ("resnet50", 1, 43.5),
        ("resnet101", 1, 76.8),
        ("resnet200", 1, 140.6),
    ],
)
def test_published_multiply_accumulates(name, digits, giga):
    assert round(registry.macs(registry.build(name), 300) / 1e9, digits) == giga


def resnet36_macs_by_hand(time: int, freq: int) -> dict[str, int]:
    """PAPER's description of ResNet-36, added up stage by stage."""
    macs = {"stem": time * freq * 9 * 1 * 128}
    inputs = 128
    for stage, (blocks, channels) in enumerate(zip((3, 4, 6, 3), (128, 128, 256, 256)), 1):
        strided = stage > 1
        if strided:
            time, freq = (time + 1) // 2, (freq + 1) // 2
        area = time * freq
        total = area * 9 * inputs * channels + area * (2 * blocks - 1) * 9 * channels * channels
        total += area * inputs * channels if strided else 0
        total += 2 * blocks * channels * channels if stage <= 2 else 0
        macs[f"stage{stage}"] = total
        inputs = channels
    macs["pooling"] = 2 * time * (freq * 256) * 128
    macs["embedding"] = 2 * (freq * 256) * 256
    return macs


@pytest.mark.parametrize("frames", [1, 300, 301])
def test_macs_of_resnet36_equal_those_added_up_by_hand(frames):
    by_component: dict[str, int] = {}
    model = registry.build("resnet36")
    for name, count in registry.layer_macs(model, frames).items():
        part = model.component_of(name)
        by_component[part] = by_component.get(part, 0) + count
    assert by_component == resnet36_macs_by_hand(frames, 81)


def test_published_shares_of_resnet36():
    model = registry.build("resnet36")
    macs = registry.layer_macs(model)
    parameters = {name: leaf.size for name, leaf in named_leaves(registry.shapes(model)["params"])}

    def shares(counts: dict[str, int]) -> list[float]:
        parts = dict.fromkeys(model.components(), 0)
        for name, count in counts.items():
            parts[model.component_of(name)] += count
        return [round(100 * parts[part] / sum(parts.values()), 1) for part in model.components()]

    assert macs.keys() == weights(model).keys()
    assert shares(parameters)[1:] == [6.6, 8.9, 45.7, 24.2, 4.8, 9.7]
    assert shares(macs)[1:5] == [52.2, 17.9, 26.1, 3.7]


def jaxpr_macs(jaxpr) -> int:
    """Multiply-accumulates of every convolution and matrix product in a jaxpr, however deeply nested."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
            total += eqn.outvars[0].aval.size * kernel.size // kernel.shape[out_axis]
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval
            total += eqn.outvars[0].aval.size * int(np.prod([lhs.shape[axis] for axis in contracted]))
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "eqns"):
                    total += jaxpr_macs(inner)
                elif hasattr(inner, "jaxpr"):
                    total += jaxpr_macs(inner.jaxpr)
    return total


@pytest.mark.parametrize("name", ["resnet36", "resnet50", "wespeaker_resnet34", "wespeaker_resnet50"])
def test_macs_equal_those_of_the_traced_arithmetic(name):
    model = registry.build(name)
    features = jax.ShapeDtypeStruct((1, 123, model.features), np.float32)
    traced = jax.make_jaxpr(model.apply)(registry.shapes(model), features)
    assert registry.macs(model, 123) == jaxpr_macs(traced.jaxpr)


def test_wespeaker_resnet34_is_the_published_one():
    model = registry.build("wespeaker_resnet34")
    convolutions = [leaf for leaf in weights(model).values() if len(leaf.shape) == 4]
    assert len(convolutions) == 36
    assert round(registry.parameter_count(model) / 1e6, 2) == 6.63
    folded = registry.build("wespeaker_resnet34", norm="bias")
    assert round(registry.parameter_count(folded) / 1e6, 2) == 6.63
    assert weights(folded)["head/linear/kernel"].shape == (5120, 256)
    assert "batch_stats" not in registry.shapes(folded)


# WeSpeaker's own count at 80 bands and 256 dimensions, `sum(p.numel() for p in model.parameters())` of
# wespeaker/models/resnet.py run in PyTorch.
WESPEAKER_PARAMETERS = {
    "wespeaker_resnet18": 4_105_440,
    "wespeaker_resnet34": 6_634_336,
    "wespeaker_resnet50": 11_131_360,
    "wespeaker_resnet101": 15_892_448,
    "wespeaker_resnet152": 19_814_880,
    "wespeaker_resnet221": 23_792_224,
    "wespeaker_resnet293": 28_626_016,
}


@pytest.mark.parametrize(("name", "count"), WESPEAKER_PARAMETERS.items())
def test_wespeaker_parameter_counts(name, count):
    assert registry.parameter_count(registry.build(name)) == count


@pytest.mark.parametrize("name", SHIPPED)
def test_every_network_takes_narrow_settings(name):
    model = registry.build(name, **NARROW)
    embedding = jax.eval_shape(model.apply, registry.shapes(model), jax.ShapeDtypeStruct((2, 9, 16), np.float32))
    assert embedding.shape == (2, 8)
    assert embedding.dtype == np.float32


@pytest.mark.parametrize("name", SHIPPED)
def test_default_settings_build_the_default_network(name):
    assert registry.build(name, **registry.default_settings(name)) == registry.build(name)


def test_width_and_depth_are_settings():
    model = registry.build("resnet36", width=32, blocks=[1, 2, 3, 4], features=40, embedding_size=64)
    kernels = weights(model)
    assert kernels["stem/conv/kernel"].shape == (3, 3, 1, 32)
    assert kernels["stage4/block3/conv2/kernel"].shape == (3, 3, 64, 64)
    assert "stage4/block4/conv1/kernel" not in kernels
    assert kernels["head/linear/kernel"].shape == (2 * 5 * 64, 64)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet37", {}, r"unknown model 'resnet37'.*resnet36"),
        ("resnet36", {"widht": 8}, r"resnet36 has no setting 'widht'.*width"),
        ("wespeaker_resnet34", {"activation": "relu"}, r"no setting 'activation'"),
        ("resnet36", {"preactivation": True}, r"no setting 'preactivation'"),
        ("resnet36", {"width": 0}, r"width \(=0\)"),
        ("resnet36", {"width": 3.5}, r"width \(=3.5\)"),
        ("resnet36", {"blocks": [3, 4, 6]}, r"blocks \(=\[3, 4, 6\]\)"),
        ("resnet36", {"blocks": "3463"}, r"blocks \(=3463\)"),
        ("wespeaker_resnet34", {"features": -1}, r"features` \(=-1\)"),
        ("resnet36", {"embedding_size": True}, r"embedding_size \(=True\)"),
        ("resnet36", {"norm": "layer"}, r"norm \(=layer\)"),
        ("resnet36", {"dtype": "float23"}, r"dtype \(=float23\)"),
        ("resnet36", {"dtype": "int8"}, r"dtype \(=int8\)"),
        ("resnet36", {"dtype": None}, r"dtype \(=None\)"),
        ("resnet50", {"activation": "gelu"}, r"activation \(=gelu\)"),
        ("resnet50", {"last_taps": 5}, r"last_taps \(=5\)"),
        ("resnet36", {"remat": 1}, r"remat \(=1\)"),
        ("campplus", {"layers": 5}, r"layers \(=5\) must be a list like \[12, 24, 16\]"),
        ("campplus", {"floor": "a"}, r"floor \(=a\) must be a number"),
        ("ecapa_c512", {"context": "no"}, r"context \(=no\) must be true or false"),
        ("redimnet_b2", {"stages": 5}, r"stages \(=5\) must be a list like"),
        ("redimnet_b2", {"stages": [[1, 1, 1, 2.5]]}, r"stages\[0\].reduction \(=2.5\)"),
        ("redimnet_b2", {"width": 2, "stages": [[1, 1, 1, 0]]}, r"group_divisor \(=4\) .* of 2 channels"),
        ("redimnet_b2", {"width": 14}, r"group_divisor \(=4\) .* of 14 channels"),
        ("redimnet_b2", {"features": 1, "width": 4, "stages": [[1, 1, 1, 9]]}, r"do not divide 1 features"),
        ("graph", {"graph": ["x"]}, r"graph \(=\['x'\]\) must be a text"),
    ],
)
def test_a_bad_setting_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        registry.build(name, **settings)


def test_initialize_draws_what_shapes_says_and_depends_on_the_key_alone():
    model = registry.build("resnet50", **NARROW)
    first, again, other = (registry.initialize(model, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), registry.shapes(model)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["params"]["stem"]["conv"]["kernel"], other["params"]["stem"]["conv"]["kernel"])


@pytest.mark.parametrize(("name", "conv_init"), [("resnet50", KAIMING_NORMAL), ("wespeaker_resnet18", TORCH_DEFAULT)])
def test_initialize_draws_from_the_distributions_of_init(name, conv_init):
    model = registry.build(name, width=32, blocks=[1, 1, 1, 1])
    assert model.kernel_init is conv_init
    for path, leaf in named_leaves(registry.initialize(model, jax.random.key(0))):
        leaf = np.asarray(leaf)
        if not path.endswith("kernel"):
            assert (leaf == (1 if path.endswith(("scale", "var")) else 0)).all(), path
            continue
        fan_in, fan_out = leaf.size / leaf.shape[-1], leaf.size / leaf.shape[-2]
        bounded = leaf.ndim == 2 or conv_init is TORCH_DEFAULT
        deviation = (1 / (3 * fan_in)) ** 0.5 if bounded else (2 / fan_out) ** 0.5
        assert np.std(leaf) == pytest.approx(deviation, rel=8 / leaf.size**0.5), path
        # A uniform draw ends at sqrt(3) deviations, a normal one of this size well beyond.
        assert (np.abs(leaf).max() <= 1.74 * deviation) == bounded, path


@pytest.mark.parametrize(
    ("initializer", "variance", "kurtosis"),
    [(KAIMING_NORMAL, 2 / (9 * 64), 3.0), (TORCH_DEFAULT, 1 / (3 * 9 * 32), 1.8)],
)
def test_initializers_are_those_of_the_originals(initializer, variance, kurtosis):
    kernel = np.asarray(initializer(jax.random.key(0), (3, 3, 32, 64)))
    assert np.var(kernel) == pytest.approx(variance, rel=0.03)
    assert np.mean(kernel**4) / np.var(kernel) ** 2 == pytest.approx(kurtosis, rel=0.05)


def test_components():
    model = registry.build("resnet36")
    assert model.components() == ("stem", "stage1", "stage2", "stage3", "stage4", "pooling", "embedding")
    for name, component in {
        "stem/conv/kernel": "stem",
        "stage3/block5/conv2/kernel": "stage3",
        "pool/attention1/bias": "pooling",
        "head/bn_in/scale": "embedding",
    }.items():
        assert model.component_of(name) == component
    names = [name for name, _ in named_leaves(registry.shapes(model)["params"])]
    assert {model.component_of(name) for name in names} == set(model.components())
    depths = [model.parts().index(model.part_of(name)) for name in registry.layer_macs(model)]
    assert depths == sorted(depths) and depths[0] == 0 and depths[-1] == len(model.parts()) - 1
    for name in ("encoder/kernel", "params/stem/conv/kernel", "pooling/kernel"):
        with pytest.raises(UserError, match=name):
            model.component_of(name)


def test_layers_say_what_they_follow():
    plain = {layer.name: layer for layer in walk.layers(registry.build("resnet36", **NARROW), 16)}
    assert plain["stem/bn"].follows == "stem/conv" and plain["stem/conv"].follows is None
    assert plain["stage1/block0/conv2"].follows is None  # an activation lies between
    assert plain["stage2/block0/shortcut/bn"].follows == "stage2/block0/shortcut/conv"
    assert plain["head/linear"].follows == "head/bn_in" and plain["head/bn"].follows == "head/linear"
    assert plain["stage2/block0/conv1"].window == window(2, 3, 2)
    assert plain["stage2/block0/conv1"].outputs == (1, 8, 8, 4)
    before = {layer.name: layer for layer in walk.layers(registry.build("resnet50", **NARROW), 16)}
    assert before["stage1/block0/bn1"].follows is None and before["stage1/block0/bn2"].follows == "stage1/block0/conv1"
    assert before["pool/attention1"].kind == walk.LINEAR and before["stem/bn"].kind == walk.NORMALISATION


def test_smoke_settings_make_a_small_network_of_the_same_kind():
    for name in SHIPPED:
        small = registry.build(name, **registry.smoke_settings(name))
        assert 20 * registry.parameter_count(small) < registry.parameter_count(registry.build(name))


def test_a_name_stands_for_one_network():
    with pytest.raises(UserError, match="resnet18"):
        registry.register("resnet18", lambda: None)
