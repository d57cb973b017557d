"""KMQAT as the paper's configuration runs it, setting by setting, and the parts that it alone needs."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import frontend, quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.data import pipeline
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.models.walk import shapes as shapes_of
from kmq_jax.ptq.quantize import with_half_biases
from kmq_jax.study import paper as published
from kmq_jax.study.networks import runs_of, training_config
from kmq_jax.study.options import StudyOptions
from kmq_jax.study.plan import planned
from kmq_jax.training import qat
from kmq_jax.training import step as steps
from kmq_jax.training.config import default_config, published_kmqat
from kmq_jax.training.from_models import describe
from kmq_jax.training.options import QatOptions, TrainOptions
from kmq_jax.training.state import Trainable

CONFIGS = Path(__file__).parents[2] / "configs"


def paper(name="paper_resnet36", arg=None):
    """A configuration of the paper, and the options of its study."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    return config, StudyOptions.of(config.study.to_dict()) if "study" in config else None


def options_at(run_name, recipe="kmqat"):
    """The options of a quantized training of the paper's study."""
    config, study = paper()
    study = dataclasses.replace(study, recipe=recipe)
    (run,) = [run for run in runs_of(study) if run.name == run_name]
    assert run.step == f"{recipe}-{run_name}"
    return TrainOptions.from_config(training_config(config, study, run, "runs/fp32"))


FP32 = {
    "model.embedding_size": 256, "model.features": 81,
    "data.pipeline.SNR_DB[noise]": (0, 15), "data.pipeline.SNR_DB[music]": (5, 15),
    "data.pipeline.SNR_DB[babble]": (13, 20),
    "frontend.SpecAugmentConfig.max_frames": 10, "frontend.SpecAugmentConfig.max_bands": 8,
    "data.crop_samples": 56240, "data.normalize": "utterance", "data.augment": True, "data.speeds": (1.0,),
    "spec_augment": 0.6, "batch_size": 512, "epochs": 42.0, "loss.kind": "am", "loss.scale": 30.0, "loss.margin": 0.3,
    "loss.margin_start": 5.0, "loss.margin_end": 20.0, "optimizer.name": "sgd", "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 2e-4, "learning_rate.kind": "step", "learning_rate.start": 1e-5,
    "learning_rate.peak": 0.2, "learning_rate.warmup_epochs": 5.0, "learning_rate.flat_until": 19.0,
    "learning_rate.every": 10.0, "learning_rate.factor": 5.0, "quant.on": False,
}  # fmt: skip
"""Full precision, section 1 of the paper's facts."""

CONSTANTS = {
    "data.pipeline.SNR_DB[noise]": pipeline.SNR_DB["noise"],
    "data.pipeline.SNR_DB[music]": pipeline.SNR_DB["music"],
    "data.pipeline.SNR_DB[babble]": pipeline.SNR_DB["babble"],
    "frontend.SpecAugmentConfig.max_frames": frontend.SpecAugmentConfig().max_frames,
    "frontend.SpecAugmentConfig.max_bands": frontend.SpecAugmentConfig().max_bands,
}
"""What is no option: every training goes by it."""

KMQAT = {
    "init_from": "runs/fp32",  # from the full-precision checkpoint
    "epochs": 40.0, "data.augment": False, "spec_augment": 0.0, "data.speeds": (1.0,),
    # Labels by the full-precision run's loss, at its final margin from the first step on; no teacher.
    "loss.weight": 1.0, "distill.weight": 0.0, "loss.kind": "am", "loss.scale": 30.0, "loss.margin": 0.3,
    "loss.margin_start": 0.0, "loss.margin_end": 0.0,
    # 2^b centroids and a scale for each output channel; every convolution and linear layer.
    "quant.bits": 2, "quant.rules": (), "quant.granularity": "channel", "quant.recipe": "weights", "quant.coarse": (),
    "quant.retention": 0.9, "quant.symmetric": False, "quant.fit_crops": 0, "quant.bn_passes": 2,
    "quant.thaw_epochs": 2.0, "quant.centroids": "lloyd", "quant.lloyd_epochs": 1.0, "quant.lloyd_rate": 0.1,
    "quant.lloyd_unused_rate": 0.2, "quant.lloyd_clip": 1.0, "quant.lloyd_until": 1.0, "quant.reassign_every": 1,
    "quant.biases": "float16", "quant.activations": 0,
    "optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-4, "optimizer.clip": 0.0,
    "learning_rate.kind": "cosine", "learning_rate.peak": 1e-4, "learning_rate.final": 1e-7,
    "learning_rate.warmup_epochs": 0.0,
}  # fmt: skip
"""KMQAT at 2 bits, section 3. The period of assignments is open there: every step is our choice."""


def setting(options, name):
    if name in CONSTANTS:
        return CONSTANTS[name]
    for part in name.split("."):
        options = options[part] if isinstance(options, dict) else getattr(options, part)
    return options


@pytest.mark.parametrize(("name", "value"), FP32.items())
def test_full_precision_is_trained_as_published(name, value):
    assert setting(TrainOptions.from_config(paper()[0]), name) == value


@pytest.mark.parametrize(("name", "value"), KMQAT.items())
def test_two_bits_are_trained_as_published(name, value):
    assert setting(options_at("2"), name) == value


@pytest.mark.parametrize(("lines", "held"), [(published.FP32, FP32), (published.KMQAT, KMQAT)], ids=["fp32", "kmqat"])
def test_every_published_line_is_held_here_if_nowhere_else(lines, held):
    """Two lists of what is published, written apart: the one that is printed, and the one above."""
    for line in lines:
        if line.setting and not line.test and line.published is not None and line.setting != "quant.granularity":
            expected = "runs/fp32" if line.setting == "init_from" else line.published
            assert held[line.setting] == expected, line.says


def test_the_classifier_does_not_decay():
    """Nor do biases and normalisation, where all else does; in full precision, and in KMQAT."""
    for options in (TrainOptions.from_config(paper()[0]), options_at("2")):
        rules = [(pattern, own.decay) for pattern, own in options.optimizer.group_rules]
        for name, decays in (("classifier", False), ("network/stem/bn/scale", False), ("network/stem/kernel", True)):
            assert next((decay for pattern, decay in rules if re.search(pattern, name)), 1.0) == decays


def test_groups_of_the_published_optimizer():
    scale, centroids, rest = [own for _, own in options_at("2").optimizer.group_rules]
    assert (scale.peak, scale.momentum, scale.clip) == (0.75e-4, 0.0, 1.5)
    assert centroids.rate == 0 and (rest.rate, rest.decay, rest.momentum) == (1, 0, None)


def test_the_study_is_the_papers():
    _, study = paper()
    assert [run.step for run in runs_of(study)] == ["kmqat-4", "kmqat-3", "kmqat-2", "kmqat-mixed"]
    assert [study.epochs[name] for name in ("4", "3", "2", "mixed")] == [40, 40, 40, 40]
    trained = [work.amount for work in planned(study, 42.0) if work.kind == "kmqat"]
    assert trained == [40, 40, 40, 120]  # of mixed precision in three phases, for the time that is left
    assert (study.max_frames, study.max_seconds) == (1400, 0)
    mixed = options_at("mixed").quant
    assert (mixed.average_bits, mixed.budget_bits, mixed.sections, mixed.hessian_draws) == (3.144, (2, 3, 4), 4, 10)
    assert mixed.multi_stage and mixed.bits == 0 and mixed.recipe == "weights"


@pytest.mark.parametrize("name", ["paper_resnet36", "paper_resnet200", "voxceleb2_resnet36", "voxceleb2_resnet200"])
def test_the_public_code_is_a_variant(name):
    config, _ = paper(name, "public")
    assert (config.epochs, config.optimizer.weight_decay) == (51.0, 1e-4)
    config, _ = paper(name)
    assert (config.epochs, config.optimizer.weight_decay) == (42.0, 2e-4)


def test_each_recipe_is_chosen_by_one_setting():
    config, study = paper()
    for name in ("wespeaker_so762", "so762_resnet36_small"):
        config, study = paper(name)
        assert study.recipe == "distilled" and {plan.family for plan in study.cascades} <= {
            "distilled",
            "distilled-nested",
        }
        config.study.recipe = "kmqat"
        study = StudyOptions.of(config.study.to_dict())
        assert {plan.family for plan in study.cascades} <= {"kmqat", "distilled-nested"}
        assert [run.step for run in runs_of(study)][:3] == ["kmqat-4", "kmqat-3", "kmqat-2"]
        nested = runs_of(study)[3]
        assert (nested.step, nested.grow_from) == ("distilled-nested", "kmqat-2")
        own = training_config(config, study, runs_of(study)[2], "x")
        assert (own.loss.weight, own.distill.weight, own.epochs) == (1.0, 0.0, config.study.epochs["2"])


def parts(average_bits=0.0, **quantization):
    """Objective, task and parameters of a tiny network that is quantized as published."""
    config = published_kmqat(default_config("resnet36", width=8, embedding_size=8), 0 if average_bits else 2)
    config.quant.update(average_bits=average_bits, **quantization)
    config.update(epochs=6.0)
    options = TrainOptions.from_config(config)
    network = describe(options).network()
    objective = steps.make_objective(network, frontend_of("kiwano"), options, mesh.make_mesh(jax.devices()[:1]), 10)
    shapes = Trainable(jax.ShapeDtypeStruct((4, 1, 8), jnp.float32), shapes_of(network)["params"])
    return objective, steps.make_task(options, 10), shapes


def test_the_mean_is_removed_over_the_whole_utterance():
    config, _ = paper(arg="smoke")
    config.data.augment, config.spec_augment = False, 0.0
    options = TrainOptions.from_config(config)
    objective = dataclasses.replace(parts()[0], options=options)
    wave = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    whole = frontend.mean_normalize(frontend.fbank(wave[None], frontend.KIWANO))[0]
    batch = {
        "wave": jnp.asarray(np.resize(wave, 32000))[None],
        "length": jnp.array([20000]),
        "place": jnp.array([0.5]),
    }
    found = steps.features_of(objective, jax.random.key(0), batch)[0]
    start = (len(whole) - 98 + 1) // 2
    np.testing.assert_allclose(found, whole[start : start + 98], atol=1e-4)
    assert abs(float(found.mean(axis=0).max())) > 1e-3  # which is not that of the crop


def test_periods_of_epochs_become_steps():
    _, task, _ = parts()
    assert (task.options.lloyd_every, task.options.reassign_every, task.thaw, task.last_move) == (10, 1, 20.0, 60.0)
    with pytest.raises(UserError, match="bn_passes"):
        QatOptions(bits=4, coarse=(2,), grow_from="x", bn_passes=1)
    with pytest.raises(UserError, match="average_bits"):
        QatOptions(bits=4, average_bits=3.0)


def phased(bits=(2, 3, 4), **quantization):
    """A recipe of mixed precision in phases whose tensors have these bits in turn, and the shapes of its parameters."""
    objective, task, shapes = parts(average_bits=3.0, multi_stage=True, **quantization)
    names = sorted(quant.decide(shapes.network, {"kernel$": 2}))
    task = dataclasses.replace(task, allocation={name: bits[i % len(bits)] for i, name in enumerate(names)})
    shapes = dataclasses.replace(shapes, network=task.shapes(shapes.network))
    return steps.make_recipe(objective, task, shapes), shapes


def test_every_phase_has_a_cosine_of_its_own():
    recipe, _ = phased()
    rates = [float(recipe.rate_at(jnp.array(step))) for step in (0, 30, 59, 60, 90, 120, 179)]
    np.testing.assert_allclose(rates[:4], [1e-4, (1e-4 + 1e-7) / 2, rates[6], 1e-4], rtol=1e-4)
    assert rates[2] < 1e-6 and rates[4] == rates[1] and rates[5] == rates[0]


@pytest.mark.parametrize(("bits", "phases"), [((2, 3, 4), 3), ((2, 4), 2), ((3,), 1)])
def test_every_phase_lasts_as_many_epochs_however_many_there_are(bits, phases):
    recipe, _ = phased(bits)
    assert (recipe.phases, recipe.total_steps) == (phases, 60 * phases)  # six epochs of ten steps
    found = [recipe.phase_at(step) for step in range(recipe.total_steps)]
    assert found == [phase for phase in range(phases) for _ in range(60)]


def test_scales_are_frozen_at_the_start_of_every_phase():
    """Two epochs of ten steps, in phases of sixty: both where gradients are taken and where decay is undone."""
    recipe, _ = phased()
    assert [int(recipe.in_phase(jnp.array(step))) for step in (0, 19, 59, 60, 79, 80, 120)] == [0, 19, 59, 0, 19, 20, 0]
    bits = {"first/kernel": 2, "second/kernel": 3}
    task = dataclasses.replace(recipe.task, allocation=bits)  # of a smaller network
    rng = np.random.default_rng(0)
    network = {name.partition("/")[0]: {"kernel": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32)} for name in bits}
    given = qat.init_params(task.options, network, bits)
    indices = task.init_indices(given)

    @jax.jit
    def one(at):
        def total(books):
            weights = task.weights(dataclasses.replace(given, codebooks=books), indices, at, None)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights))

        decayed = jax.tree.map(lambda x: 0.9 * x, given)
        after, _ = task.after_update(given, decayed, indices, at + 1)
        slopes = jax.grad(total, allow_int=True)(given.codebooks)
        books = slopes.values(), given.codebooks.values(), after.codebooks.values()
        return [(slope.raw_scale != 0, old.raw_scale != new.raw_scale) for slope, old, new in zip(*books, strict=True)]

    for step, thawed in ((0, False), (19, False), (20, True), (60, False), (79, False), (80, True)):
        for learns, moves in one(recipe.in_phase(jnp.array(step))):
            assert bool(learns.all()) == bool(learns.any()) == bool(moves.all()) == bool(moves.any()) == thawed


def test_an_average_of_bits_is_kept_and_nearly_used_up():
    rng = np.random.default_rng(0)
    network = {f"l{i}": {"kernel": jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)} for i in range(8)}

    def loss(network):
        return sum((i + 1) * jnp.sum(network[f"l{i}"]["kernel"] ** 2) for i in range(8))

    found = qat.allocate(QatOptions(average_bits=3.144, hessian_draws=2), network, loss, jax.random.key(0))
    assert np.mean(list(found.values())) == 3.0  # sections of equal size: the next is 3.25
    assert found["l7/kernel"] >= found["l0/kernel"] and set(found.values()) <= {2, 3, 4}


def test_indices_begin_as_the_paper_places_them():
    weights = np.random.default_rng(1).standard_t(3, (40, 3)).astype(np.float32)
    settings = QatOptions(bits=2, recipe="weights", reassign_every=5)
    params = qat.init_params(settings, {"layer": {"kernel": weights}})
    found = np.asarray(qat.first_indices(settings, params)["layer/kernel"])
    book = params.codebooks["layer/kernel"]
    for channel in range(3):
        column = weights[:, channel]
        low, high = np.quantile(column, [0.05, 0.95])
        unit = np.clip(column / max(abs(low), abs(high)), -1, 1)
        expected = np.argmin(np.abs(unit[:, None] - np.asarray(book.centroids)[channel]), axis=1)
        np.testing.assert_array_equal(found[:, channel], expected)
    assert qat.first_indices(dataclasses.replace(settings, reassign_every=0), params) == {}


SHAPES = {"resnet36": (14_894_208, 12_160, 4_992, 13_056), "resnet200": (59_835_520, 51_200, None, None)}
TABLE = {  # MiB: packed indices, codebooks, total without the classifier
    ("resnet36", 4): (7.102, 0.371, 7.68), ("resnet36", 3): (5.327, 0.186, 5.72), ("resnet36", 2): (3.551, 0.093, 3.85),
    ("resnet200", 4): (None, None, 30.83), ("resnet200", 3): (None, None, 22.91), ("resnet200", 2): (None, None, 15.39),
}  # fmt: skip
CLASSIFIER = 5994 * 256 * 4
WITH_CLASSIFIER = {4: 13.535, 3: 11.574, 2: 9.706}


def packed_shapes(name, bits):
    network = registry.build(name, **registry.default_settings(name))
    variables = shapes_of(network)
    params = quant.quantize_params(variables["params"], {r"/kernel$": quant.QuantSpec(bits, only_smaller=False)})
    return {**variables, "params": jax.eval_shape(with_half_biases, params)}


@pytest.mark.parametrize(("name", "bits"), TABLE)
def test_the_memory_table_holds_in_every_cell(name, bits):
    size = quant.size_bytes(packed_shapes(name, bits))
    indices, codebooks, total = TABLE[name, bits]
    mib = 1 << 20
    if indices:
        assert (round(size.indices / mib, 3), round(size.codebooks / mib, 3)) == (indices, codebooks)
        # At 4 bits it is 13.5355, which was published as 13.535.
        assert (size.total + CLASSIFIER) / mib == pytest.approx(WITH_CLASSIFIER[bits], abs=6e-4)
    assert round(size.total / mib, 2) == total


def hand(groups, gradients, count=1):
    """Parameters after so many steps of the published optimizer with groups."""
    options = TrainOptions.from_config(published_kmqat(default_config("resnet18"), 2)).optimizer
    options = dataclasses.replace(options, groups=groups)
    params = Trainable(jnp.ones(1), {name: jnp.ones(2) for name in gradients})

    def schedule(peak):
        return lambda step: jnp.float32(0.1 if peak is None else peak)

    optimizer = steps.make_optimizer(options, schedule, params)
    state = optimizer.init(params)
    given = Trainable(jnp.zeros(1), {name: jnp.array(value) for name, value in gradients.items()})
    for _ in range(count):
        updates, state = optimizer.update(given, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return {name: np.asarray(value) for name, value in params.network.items()}


def test_groups_by_hand():
    groups = (
        ("raw_scale", {"peak": 0.5, "momentum": 0.0, "clip": 1.5, "decay": 0.0}),
        ("centroids", 0.0, 0.0),
        ("bias", 1.0, 0.0),
    )
    gradients = {"raw_scale": [3.0, 4.0], "centroids": [1.0, 1.0], "bias": [1.0, 2.0], "kernel": [100.0, 200.0]}
    found = hand(groups, gradients, count=2)
    # Clipped to norm 1.5 by itself, whatever the kernel's gradient; no momentum: two steps of the same length.
    np.testing.assert_allclose(found["raw_scale"], 1 - 2 * 0.5 * 1.5 * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_array_equal(found["centroids"], [1, 1])
    # Momentum 0.9: steps of 1 and 1.9 gradients.
    np.testing.assert_allclose(found["bias"], 1 - 0.1 * 2.9 * np.array([1.0, 2.0]), rtol=1e-6)
    first = 1 - 0.1 * (np.array([100.0, 200.0]) + 1e-4)
    second = first - 0.1 * (0.9 * (np.array([100.0, 200.0]) + 1e-4) + np.array([100.0, 200.0]) + 1e-4 * first)
    np.testing.assert_allclose(found["kernel"], second, rtol=1e-6)
