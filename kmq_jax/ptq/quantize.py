"""A packed low-bit model from a full-precision one, without training."""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json, write_json
from kmq_jax.core.tree import Leaf, Params, map_named, named_leaves
from kmq_jax.data import source
from kmq_jax.models.about import METRICS, made_by, told
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, fingerprint, frontend_of
from kmq_jax.ptq import activations as ranges
from kmq_jax.ptq import budget
from kmq_jax.ptq.fit import fit, patterned
from kmq_jax.ptq.moments import random_features
from kmq_jax.ptq.options import QuantizeOptions

EMBEDDED = "synthetic:train"
"""What layers are fitted on where no recordings are given: synthetic voices that come with the package."""
CROPS = 100
"""Crops of speech that layers are fitted on."""
SECONDS = 2.0
"""Length of each."""
_JUDGED = 16  # further crops, on which the loss is measured
_OF_FEWER_BITS = re.compile(rf"^{PER_BITS}/\d+/")  # before the names of leaves that fewer bits have to themselves


def quantize_model(
    model: SpeakerModel,
    rules: Sequence[quant.QuantRule],
    data: str | None = None,
    crops: int = CROPS,
    biases: str = "float32",
    activations: int | None = None,
) -> SpeakerModel:
    """Replaces a model's tensors by codebooks and packed indices.

    Args:
        model: in full precision.
        rules: which tensors, and how.
        data: one DATA or several separated by commas: layers are fitted on crops of these recordings. Without it
            weights are quantized as they are.
        crops: how many crops.
        biases: "float16" stores those of convolutions and linear layers at half the size, where float16 holds them.
        activations: 8 rounds the inputs of quantized convolutions, so that they compute with integers alone; ranges
            are measured on the data. What goes into linear and LSTM layers stays as it is; None leaves all of it so.

    Returns:
        The quantized model, which notes what it was fitted on and how it was made.

    Raises:
        UserError: the model is quantized already, a rule names no tensor, the data cannot be read, or there is none
            to measure activations on.
    """
    if activations and not data:
        raise UserError("`activations` needs `data`: speech that their ranges are measured on")
    if quant.codebook_tensors(model.variables):
        raise UserError("the model is quantized already: quantize the model it was made from")
    params = quant.quantize_params(model.variables["params"], rules)
    about = {**model.about, "fitted_on": told(data) if data else "nothing", "made_by": made_by()}
    about.pop(METRICS, None)  # those are of the model in full precision
    packed = dataclasses.replace(model, variables={**model.variables, "params": params}, about=about)
    if data:
        features = random_features(frontend_of(model.frontend), source.open_sources(data), crops, SECONDS)
        if activations:
            packed = ranges.with_ranges(packed, ranges.measure(model, features))
        packed = fit(model, packed, features, levels=patterned(model.variables["params"], rules))
    if biases == "float32":
        return packed
    return dataclasses.replace(packed, variables=with_half_biases(packed.variables))


def fitting(data: str | None) -> str:
    """What was done to a model without training, and what to expect of it.

    >>> fitting("speech")
    'fitted on crops of speech'

    Args:
        data: as in `quantize_model`.
    """
    if data is None:
        return "not fitted: at few bits expect several times the errors of a fitted model"
    if data == EMBEDDED:
        return f"fitted on embedded voices ({data}); speech like yours, by --data=DATA, may serve better"
    return f"fitted on crops of {data}"


def with_half_biases(tree: Params) -> Params:
    """Rounds the biases of layers with a kernel to float16, at all bits: all biases but those of normalisations.

    Biases that are too large for float16, or so small that it loses much of them, stay as they are.

    >>> import jax
    >>> layers = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"bias": jnp.ones(2)}}
    >>> jax.tree.map(lambda leaf: leaf.dtype.name, with_half_biases(layers))
    {'conv': {'bias': 'float16', 'kernel': 'float32'}, 'norm': {'bias': 'float32'}}

    Args:
        tree: parameters, or a model's variables, packed or not, or their shapes (inside `jax.eval_shape`).
    """
    names = {name for name, _ in named_leaves(tree, is_leaf=quant.is_codebook_tensor)}

    def halved(name: str, leaf: Leaf) -> Leaf:
        layer, _, kind = name.rpartition("/")
        layer = _OF_FEWER_BITS.sub("", layer)
        return _half(leaf) if kind == "bias" and f"{layer}/kernel" in names else leaf

    return map_named(halved, tree, is_leaf=quant.is_codebook_tensor)


def _half(bias: Leaf) -> Leaf:
    try:
        quant.types.stored(bias, "float16")
    except UserError:
        return bias
    return bias.astype(jnp.float16)


def rules_of(options: QuantizeOptions) -> list[quant.QuantRule]:
    """The rules that options describe: `skip` first, then `rules`, then `bits` for every other kernel.

    Raises:
        UserError: the file of rules cannot be read, or a rule has another form.

    >>> [rule.pattern for rule in rules_of(QuantizeOptions(bits=2, skip=("^stem/",)))]
    ['^stem/', '/kernel$']
    """
    spec = quant.QuantSpec(
        options.bits or 8,
        granularity=options.granularity,
        coarse=options.nested,
        levels=options.levels,
    )
    rules = [quant.QuantRule(pattern, None) for pattern in options.skip]
    rules += [_rule(entry, spec, str(options.rules)) for entry in _listed(options)]
    if options.bits is None and any(rule.spec is not None for rule in rules):
        raise UserError(f"{options.rules} gives bits, which `budget` and `size` choose: there only null has a meaning")
    return [*rules, quant.QuantRule(r"/kernel$", spec)]


def rules_within(
    model: SpeakerModel, options: QuantizeOptions, data: str, folder: Path, crops: int = CROPS
) -> tuple[list[quant.QuantRule], budget.Sensitivities, dict[str, int]]:
    """The rules that keep to a budget.

    Args:
        model: in full precision.
        options: with a budget or a size.
        data: as in `quantize_model`.
        folder: where sensitivities are kept, in a file whose name stands for model, tensors and recordings. It is read
            where it exists, else measured and written, so that another budget needs no measurement.
        crops: how many crops.

    Returns:
        The rules, what was measured, and the bits of each tensor.

    Raises:
        UserError: even the fewest bits exceed the budget, or the data, or the file of sensitivities, cannot be read.
    """
    size = budget.bytes_from(options.size) if options.size else None
    rules = rules_of(options)
    utterances = source.open_sources(data)
    measured_on = f"{data} {_stamp(utterances)} {min(crops, budget.CROPS)}"
    mark = budget.mark_of(fingerprint(model), rules, measured_on)
    kept = folder / f"sensitivities-{mark}.json"
    found = _kept(kept) if kept.is_file() else None
    if found is None or found.model != mark:
        features = random_features(frontend_of(model.frontend), utterances, crops, SECONDS)
        found = budget.measure(model, mark, rules, features)
        write_json(kept, found.to_json())
    found = dataclasses.replace(found, rest=found.rest + extra_bytes(model, found.errors, options))
    bits_of = budget.allocate(found, options.budget, size)
    spec = quant.QuantSpec(8, granularity=options.granularity, levels=options.levels)
    # A file of rules can only say null here. What it keeps is not in `bits_of`, and no rule names it.
    fixed = [quant.QuantRule(pattern, None) for pattern in options.skip]
    return [*fixed, *quant.rules_of(bits_of, spec)], found, bits_of


def extra_bytes(model: SpeakerModel, names: Collection[str], options: QuantizeOptions) -> int:
    """Bytes that a file takes beside those of `budget.measure`; fewer than zero where it takes less.

    Args:
        model: in full precision.
        names: of the tensors that are quantized.
        options: their biases and activations count.
    """
    more = 0
    if options.biases == "float16":
        more += quant.size_bytes(with_half_biases(model.variables)).total - quant.size_bytes(model.variables).total
    if options.activations:
        # Two numbers for each place, and a step for each output channel of a quantized kernel.
        channels = [leaf.shape[-1] for name, leaf in named_leaves(model.variables["params"]) if name in names]
        more += sum(budget.HEADER + 4 * count for count in (*channels, *(2 for _ in ranges.places_of(model))))
    return more


def measured_loss(model: SpeakerModel, quantized: SpeakerModel, data: str, crops: int = CROPS) -> float | None:
    """One minus the cosine to full precision's embeddings, on average over crops that layers were not fitted on.

    It is None where there are no others: of few short recordings, each of which is one crop.
    """
    # Draws are seeded: the first `crops` are those of the fit, the last ones are further ones.
    features = random_features(frontend_of(model.frontend), source.open_sources(data), crops + _JUDGED, SECONDS)
    # A recording that is shorter than a crop gives the same crop each time.
    seen = [crop.tobytes() for crop in np.asarray(features)]
    fitted = set(seen[:crops])
    others = [i for i in range(crops, len(seen)) if seen[i] not in fitted]
    return budget.loss_of(model, quantized, features[np.array(others)]) if others else None


def describe_loss(loss: float | None) -> str:
    """What `measured_loss` found, in a line.

    >>> describe_loss(0.02)
    'measured on other crops, fitted: loss of cosine 0.0200'
    """
    if loss is None:
        return "the loss is not measured: these recordings have no crops but those that were fitted on"
    return f"measured on other crops, fitted: loss of cosine {loss:.4f}"


def _stamp(utterances: source.Utterances) -> str:
    """A text that changes when recordings are added, taken away or written anew."""
    spans = () if utterances.spans is None else utterances.spans.ravel().tolist()
    lines = [*utterances.ids, *map(str, spans), *utterances.stamps()]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _kept(file: Path) -> budget.Sensitivities:
    found = read_json(file)
    try:
        return budget.Sensitivities.from_json(found)
    except UserError as error:
        raise UserError(f"{file}: {error}; remove the file, and they are measured again") from error


def _listed(options: QuantizeOptions) -> list[object]:
    listed = read_json(options.rules) if options.rules else []
    if not isinstance(listed, list):
        raise UserError(f"{options.rules} must hold a list of rules")
    return listed


def _rule(entry: object, spec: quant.QuantSpec, file: str) -> quant.QuantRule:
    if not isinstance(entry, dict) or set(entry) != {"pattern", "bits"}:
        raise UserError(f"{file}: {entry!r} must have `pattern` and `bits`")
    bits = entry["bits"]
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not isinstance(entry["pattern"], str) or bits is not None and not whole:
        raise UserError(f"{file}: {entry!r} must have a text as `pattern`, and a whole number or null as `bits`")
    return quant.QuantRule(entry["pattern"], None if bits is None else dataclasses.replace(spec, bits=bits, coarse=()))
