"""What a run takes from other models: the network it starts from, its teacher, and the network it grows from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, Params, Variables, named_leaves
from kmq_jax.data import source
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all, load_model
from kmq_jax.scoring import cosine
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.state import Trainable, load_classifier


def describe(options: TrainOptions) -> SpeakerModel:
    """The model that the options describe, without weights."""
    settings = dict(options.model)
    return SpeakerModel(settings.pop("name"), settings, options.frontend, None)


def load_start(
    options: TrainOptions, params: Trainable, batch_stats: Params, utterances: source.Utterances
) -> tuple[Trainable, Params]:
    """Takes the network of the MODEL `init_from`, and its classifier where it is a run that had one.

    A classifier with more classes is cut: speed perturbation numbers the speakers at their own speed first, so
    fine-tuning without it goes on from their centres. Without a classifier that fits, centres are the speakers' mean
    embeddings where the loss uses them; those of speakers at other speeds stay random.

    Args:
        options: the run's.
        params: random parameters.
        batch_stats: their running statistics.
        utterances: the training data.

    Returns:
        Parameters and running statistics.

    Raises:
        UserError: the networks differ; the message names the first parameter that does.
    """
    path = Path(options.init_from)
    given = load_like("init_from", options.init_from, params.network, batch_stats)
    classifier, centres = params.classifier, None
    if (path / "checkpoints").is_dir():
        with Checkpoints(path / "checkpoints") as checkpoints:
            centres = load_classifier(checkpoints)
    if centres is not None and centres.shape[0] >= classifier.shape[0] and centres.shape[1:] == classifier.shape[1:]:
        classifier = jnp.asarray(centres[: classifier.shape[0]])
    elif options.loss.weight:
        means = speaker_means(dataclasses.replace(describe(options), variables=given), utterances, options)
        classifier = classifier.at[: len(means), 0].set(means)  # other sub-centres stay random
    return Trainable(classifier, given["params"]), given["batch_stats"]


def speaker_means(
    model: SpeakerModel, utterances: source.Utterances, options: TrainOptions, each: int = 4
) -> np.ndarray:
    """Mean embeddings `[speakers, dim]` of up to `each` recordings a speaker; each has length one before the mean."""
    # Sorted by speaker, then cut where the next speaker begins.
    by_speaker = np.split(np.argsort(utterances.labels, kind="stable"), np.cumsum(np.bincount(utterances.labels))[:-1])
    # Evenly spaced among a speaker's recordings.
    few = utterances.select(np.concatenate([part[:: -(-len(part) // each)] for part in by_speaker]))
    embeddings = embed_all(model, few, options.dtype, options.data.crop_seconds, options.batch_size)
    sums = np.zeros((len(by_speaker), embeddings.shape[1]), np.float32)
    np.add.at(sums, few.labels, cosine.unit_rows(embeddings))
    return sums / np.bincount(few.labels)[:, None]


def load_teacher(options: TrainOptions, network: Params, batch_stats: Params) -> Variables | None:
    """The variables of the network to distil from, or None where there is none.

    Raises:
        UserError: it is another network than `network`; the message names the first parameter that differs.
    """
    if not options.distill.weight:
        return None
    if options.distill.teacher:
        return load_like("distill.teacher", options.distill.teacher, network, batch_stats)
    return load_like("init_from", options.init_from, network, batch_stats)


def load_parent(options: TrainOptions) -> Params | None:
    """The packed parameters of the network that nested codebooks grow from, or None where there is none."""
    if not options.quant.grow_from:
        return None
    packed = load_model(options.quant.grow_from).variables["params"]

    def whole(leaf: Leaf) -> Leaf:
        return leaf if quant.is_codebook_tensor(leaf) else jnp.asarray(leaf, jnp.float32)  # biases may be in float16

    return jax.tree.map(whole, packed, is_leaf=quant.is_codebook_tensor)


def load_like(setting: str, path: str, params: Params, batch_stats: Params) -> Variables:
    """The variables of the MODEL `path`, in full precision, which must have the shapes of `params` and `batch_stats`.

    Raises:
        UserError: they have not; the message names `setting` and the first leaf that differs.
    """
    given = quant.dequantize_params(at_bits(load_model(path), None).variables)  # a nested model at its most bits
    for part, fresh in (("params", params), ("batch_stats", batch_stats)):
        here, there = dict(named_leaves(fresh)), dict(named_leaves(given.get(part, {})))
        for name in sorted(here.keys() | there.keys()):
            if name not in here or name not in there or here[name].shape != there[name].shape:
                raise UserError(f"{setting}={path}: {part}/{name} has another shape there, or is in one network only")
    return {part: jax.tree.map(jnp.asarray, given.get(part, {})) for part in ("params", "batch_stats")}
