"""What a run takes from other models: the network it starts from, its teacher, and the network it grows from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_object
from kmq_jax.core.options import shown
from kmq_jax.core.tree import Leaf, Params, Variables, named_leaves
from kmq_jax.data import source
from kmq_jax.models import registry
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all, load_model
from kmq_jax.scoring import cosine
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.state import Trainable, load_classifier
from kmq_jax.training.workdir import INPUTS, inputs_of

_RECORDINGS = 4  # of a speaker whose mean embedding becomes a centre


def describe(options: TrainOptions) -> SpeakerModel:
    """The model that the options describe, without weights."""
    settings = dict(options.model)
    return SpeakerModel(settings.pop("name"), settings, options.frontend, None)


def load_start(
    options: TrainOptions, params: Trainable, batch_stats: Params, utterances: source.Utterances
) -> tuple[Trainable, Params]:
    """Takes the network of the MODEL `init_from`, and its classifier where it is a run on the same speakers.

    Of a run at more speeds the centres of the speakers at these speeds are taken, so that fine-tuning without speed
    perturbation goes on from them. Without such a classifier, centres are the speakers' mean embeddings where the loss
    uses them; those of speakers at other speeds stay random.

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
    given = load_like("init_from", options.init_from, options, params.network, batch_stats)
    classifier, speeds = params.classifier, options.data.speeds
    centres = centres_of(Path(options.init_from), utterances, speeds)
    if centres is not None and centres.shape == classifier.shape:
        classifier = jnp.asarray(centres)
    elif options.loss.weight and 1.0 in speeds:
        means = speaker_means(dataclasses.replace(describe(options), variables=given), utterances, options)
        first = speeds.index(1.0) * len(means)  # speakers are numbered speed by speed
        classifier = classifier.at[first : first + len(means), 0].set(means)  # other sub-centres stay random
    return Trainable(classifier, given["params"]), given["batch_stats"]


def centres_of(workdir: Path, utterances: source.Utterances, speeds: Sequence[float]) -> np.ndarray | None:
    """The centres that a run's classifier has of the training speakers at some speeds `[classes, sub-centres, dim]`.

    None where it is no run, had no classifier yet, was on other speakers, or lacks a speed. A run of an older version
    does not tell its speakers: as many are taken for the same.
    """
    if not (workdir / "checkpoints").is_dir() or not (workdir / "config.json").is_file():
        return None
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        centres = load_classifier(checkpoints)
    known = read_object(workdir / INPUTS) if (workdir / INPUTS).is_file() else {}
    name = "speakers_hash"
    data = read_object(workdir / "config.json").get("data")
    theirs = data.get("speeds") if isinstance(data, dict) else None
    theirs = theirs if isinstance(theirs, list) else [1.0]
    count = len(utterances.speaker_names)
    if centres is None or not set(speeds) <= set(theirs) or len(centres) != count * len(theirs):
        return None
    if known.get(name, own := inputs_of(utterances)[name]) != own:
        return None
    return np.concatenate([centres[theirs.index(speed) * count :][:count] for speed in speeds])


def speaker_means(model: SpeakerModel, utterances: source.Utterances, options: TrainOptions) -> np.ndarray:
    """Mean embeddings `[speakers, dim]` of up to four recordings a speaker; each has length one before the mean."""
    # Sorted by speaker, then cut where the next speaker begins.
    by_speaker = np.split(np.argsort(utterances.labels, kind="stable"), np.cumsum(np.bincount(utterances.labels))[:-1])
    # Evenly spaced among a speaker's recordings.
    few = utterances.select(np.concatenate([part[:: -(-len(part) // _RECORDINGS)] for part in by_speaker]))
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
        return load_like("distill.teacher", options.distill.teacher, options, network, batch_stats)
    return load_like("init_from", options.init_from, options, network, batch_stats)


def load_parent(options: TrainOptions) -> Params | None:
    """The packed parameters of the network that nested codebooks grow from, or None where there is none.

    Raises:
        UserError: it is another network, or sees other features, than the options say.
    """
    if not options.quant.grow_from:
        return None
    parent = load_model(options.quant.grow_from)
    check_same_network("quant.grow_from", options.quant.grow_from, parent, options)
    packed = parent.variables["params"]

    def whole(leaf: Leaf) -> Leaf:
        return leaf if quant.is_codebook_tensor(leaf) else jnp.asarray(leaf, jnp.float32)  # biases may be in float16

    return jax.tree.map(whole, packed, is_leaf=quant.is_codebook_tensor)


def load_like(setting: str, path: str, options: TrainOptions, params: Params, batch_stats: Params) -> Variables:
    """The variables of the MODEL `path`, in full precision, which must be of the options' network.

    Args:
        setting: that names the MODEL, for messages.
        path: the MODEL.
        options: the run's.
        params: parameters of the network.
        batch_stats: its running statistics.

    Raises:
        UserError: it is of another; the message names `setting` and the first leaf or setting that differs.
    """
    model = at_bits(load_model(path), None)  # a nested model at its most bits
    given = quant.dequantize_params(model.variables)
    for part, fresh in (("params", params), ("batch_stats", batch_stats)):
        here, there = dict(named_leaves(fresh)), dict(named_leaves(given.get(part, {})))
        for name in sorted(here.keys() | there.keys()):
            if name not in here or name not in there or here[name].shape != there[name].shape:
                raise UserError(f"{setting}={path}: {part}/{name} has another shape there, or is in one network only")
    check_same_network(setting, path, model, options)
    return {part: jax.tree.map(jnp.asarray, given.get(part, {})) for part in ("params", "batch_stats")}


def check_same_network(setting: str, path: str, model: SpeakerModel, options: TrainOptions) -> None:
    """Refuses a MODEL that computes something else with the same weights than the options' network.

    Activations and floors leave no trace in the shapes of weights, nor do features of another kind.

    Raises:
        UserError: it does; the message names `setting` and what differs.
    """
    if model.frontend != options.frontend:
        raise UserError(f"{setting}={path} sees features of frontend {model.frontend!r}, not {options.frontend!r}")
    mine = describe(options)
    if model.architecture != mine.architecture:
        # Two names may stand for one network.
        if model.network().without_remat() != mine.network().without_remat():
            raise UserError(f"{setting}={path} is of model {model.architecture}, not {mine.architecture}")
        return
    known = registry.default_settings(mine.architecture)
    for name in sorted(known.keys() - {"dtype", "remat"}):  # recomputing takes less memory and changes nothing
        there, here = (shown({**known, **one.settings}[name]) for one in (model, mine))
        if there != here:
            raise UserError(f"{setting}={path} has model.{name}={there}, not {here}")
