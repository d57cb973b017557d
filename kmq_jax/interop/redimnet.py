"""ReDimNet checkpoints of WeSpeaker and of IDRnD, its authors. The stage table is read off the tensors.

Structure read in wespeaker/models/redimnet.py (https://github.com/wenet-e2e/wespeaker at dfa7419) and redimnet/model.py
(https://github.com/IDRnD/redimnet at dd9f519).
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import LEAVES, Imported, fill, network_tensors, shape_of
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.models.redimnet import TABLES

WESPEAKER, IDRND = "wespeaker", "idrnd"
_OUTER = {
    "stem/conv": "backbone.stem.0",
    "stem/norm": "backbone.stem.1",
    "pool/attention1": "pool.linear1",
    "pool/attention2": "pool.linear2",
    "head/bn_in": "bn",
}
_LINEAR = {WESPEAKER: "seg_1", IDRND: "linear"}
_FOLD = {WESPEAKER: 0, IDRND: 2}
"""The place of a stage's first convolution: IDRnD's sum and change of view are modules of the stage."""
# Settings of IDRnD's network that we know; the first of each is its default.
_KNOWN = {"hop_length": (160, 240), "feat_type": ("pt", "pt_mel"), "emb_bn": (False,), "out_channels": (None,)}
_KNOWN |= {"block_1d_type": ("conv+att",), "pooling_func": ("ASTP",), "tf_optimized_arch": (False,)}
_KNOWN |= {"block_2d_type": ("convnext_like", "basic_resnet", "basic_resnet_fwse")}
_SPECTRUM = {"norm_signal": False, "do_preemph": True, "spec_norm": "mn", "sample_rate": 16000, "n_fft": 512}
_SPECTRUM |= {"win_length": 400, "f_min": 20, "f_max": 7600}
_BLOCK = {"conv": "dwconvs.0", "bn": "norm", "pointwise": "pwconv1", "pointwise1": "conv1pw", "pointwise2": "conv2pw"}
_BLOCK |= {"se/fc1": "se.squeeze", "se/fc2": "se.exitation"}
_SQUEEZE = {"conv": "0", "bn": "1", "pointwise": "3"}
_CONTEXT = {"reduce": "red_dim_conv.0", "norm": "red_dim_conv.1", "expand": "exp_dim_conv"}
_ATTEND = {"query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj"}
_ATTEND |= {"out": "attention.out_proj", "norm1": "layer_norm", "norm2": "final_layer_norm"}
_ATTEND |= {"fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense"}


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of a ReDimNet."""
    return "backbone.stem.0.weight" in tensors and any(f"{name}.weight" in tensors for name in _LINEAR.values())


def convert(checkpoint: Checkpoint, where: str) -> Imported:
    """Makes our model of a checkpoint's tensors; the stage table and all sizes are read off them.

    The classifier (WeSpeaker's `projection.*`, IDRnD's `cls_head.*`), the constant weight of the first stage's only
    input and IDRnD's filterbank (`spec.*`) are left behind. `model_config` in IDRnD's files tells their filterbank.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape, or IDRnD's settings are missing or unknown.
    """
    toolkit = WESPEAKER if f"{_LINEAR[WESPEAKER]}.weight" in checkpoint.tensors else IDRND
    tensors = network_tensors(checkpoint, "projection." if toolkit == WESPEAKER else "cls_head.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("spec.")}
    tensors.pop(_weights(toolkit, 0, 1), None)
    settings = _settings(tensors, toolkit, where)
    name = next((n for n in TABLES if _same(TABLES[n], settings)), "redimnet_b2")
    network = registry.build(name, **settings)
    count = len(settings["stages"])
    for n in range(1, count + 1):  # [1, outputs, values, 1]
        weights = _weights(toolkit, n, count)
        shape_of(tensors, weights, 4, where)
        tensors[weights] = tensors[weights].reshape(tensors[weights].shape[1:3])
    front = f"wespeaker{settings['features']}" if toolkit == WESPEAKER else _front_end(checkpoint, settings, where)
    return Imported(name, settings, front, fill(network, tensors, namer(settings["stages"], toolkit), where))


def _front_end(checkpoint: Checkpoint, settings: Json, where: str) -> str:
    """Our name of IDRnD's front end, from its network's settings; all other settings must be known ones."""
    config = checkpoint.about.get("model_config")
    if not isinstance(config, dict):
        raise UserError(f"{where}: `model_config`, which tells the step of the filterbank, is not in the file")
    for key, known in _KNOWN.items():
        if config.get(key, known[0]) not in known:
            raise UserError(f"{where}: {key} (={config[key]!r}) must be one of {', '.join(map(repr, known))}")
    spectrum = config.get("spec_params")
    for key, value in (spectrum if isinstance(spectrum, dict) else {}).items():
        if key in _SPECTRUM and value != _SPECTRUM[key]:
            raise UserError(f"{where}: spec_params.{key} (={value!r}) must be {_SPECTRUM[key]!r}")
    step = "" if config.get("hop_length", 160) == 160 else "-15ms"
    return f"redimnet{settings['features']}{step}"


def _weights(toolkit: str, stage: int, stages: int) -> str:
    """The name of the weights with which a stage, or the last sum, adds up the outputs so far."""
    if toolkit == WESPEAKER:
        return f"backbone.inputs_weights.{stage}"
    return f"backbone.stage{stage}.0.w" if stage < stages else "backbone.fin_wght1d.w"


def _same(table: dict[str, object], settings: Json) -> bool:
    found = {**table, "stages": [list(stage) for stage in table["stages"]]}  # type: ignore[attr-defined]
    return all(settings[key] == value for key, value in found.items())


def _settings(tensors: dict[str, np.ndarray], toolkit: str, where: str) -> Json:
    width = shape_of(tensors, "backbone.stem.0.weight", 4, where)[0]
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"backbone\.stage(\d{1,2})\.", name))}
    if not numbers or numbers != set(range(max(numbers) + 1)):
        raise UserError(f"{where}: the stages backbone.stage0, backbone.stage1, ... are not complete")
    values = shape_of(tensors, _weights(toolkit, len(numbers), len(numbers)), 4, where)[2]  # a frame, as a row
    fold = _FOLD[toolkit]
    stages, channels, kinds = [], width, set()
    divisor = 1
    for s in range(len(numbers)):
        at = f"backbone.stage{s}"
        wide, _, stride, _ = shape_of(tensors, f"{at}.{fold}.weight", 4, where)
        channels *= stride  # what a stride takes from frequencies goes to channels
        blocks = [n for n in range(1, 100) if any(k.startswith(f"{at}.{n}.conv_block.") for k in tensors)]
        first = f"{at}.{fold + 1}.conv_block."
        kinds.add(
            "convnext"
            if f"{first}norm.weight" in tensors
            else ("resnet_se" if f"{first}se.squeeze.weight" in tensors else "resnet")
        )
        conv = f"{first}dwconvs.0.weight" if f"{first}norm.weight" in tensors else f"{first}conv1.weight"
        divisor = shape_of(tensors, conv, 4, where)[1]  # channels of a group
        reduced = next((v.shape[0] for k, v in tensors.items() if _is_reduction(k, at)), 0)
        # Stride, blocks, widening of channels, reduction of the context.
        stages.append([stride, len(blocks), wide // channels, values // reduced if reduced else 0])
    if len(kinds) != 1 or values % width:
        raise UserError(f"{where}: blocks of {len(kinds)} kinds, {values} values a frame with {width} channels")
    return {
        "features": values // width,
        "embedding_size": shape_of(tensors, f"{_LINEAR[toolkit]}.weight", 2, where)[0],
        "width": width,
        "block": kinds.pop(),
        "group_divisor": divisor,
        "stages": stages,
        "context": shape_of(tensors, "pool.linear1.weight", 3, where)[1] == 3 * values,
        "head_norm": toolkit == IDRND,
    }


def _is_reduction(name: str, at: str) -> bool:
    return name.startswith(f"{at}.") and name.endswith(".red_dim_conv.0.weight")


def namer(stages: Iterable[Iterable[int]], toolkit: str = WESPEAKER) -> Callable[[str], str]:
    """Makes the function from our names to WeSpeaker's or IDRnD's for a stage table.

    >>> name_of = namer([(1, 2, 2, 8)])
    >>> name_of("stage0/block1/conv1/kernel"), name_of("sum/weights")
    ('backbone.stage0.2.conv_block.conv1.weight', 'backbone.inputs_weights.1')
    >>> name_of("stage0/context/mix0/bn/mean")
    'backbone.stage0.5.tcm.0.norm.running_mean'
    >>> namer([(1, 2, 2, 8)], IDRND)("stage0/context/mix0/bn/mean")
    'backbone.stage0.7.tcm.0.norm.running_mean'
    """
    table, fold = [tuple(stage) for stage in stages], _FOLD[toolkit]

    def translate(ours: str) -> str:
        module, leaf = ours.rsplit("/", 1)
        if leaf == "weights":
            place = len(table) if module == "sum" else int(module.split("/")[0].removeprefix("stage"))
            return _weights(toolkit, place, len(table))
        return f"{_module(module)}.{LEAVES[leaf]}"

    def _module(module: str) -> str:
        match = re.fullmatch(r"stage(\d+)/(.+)", module)
        if not match:
            return _LINEAR[toolkit] if module == "head/linear" else _OUTER[module]
        at, rest = f"backbone.stage{match[1]}", match[2]
        _, blocks, widening, _ = table[int(match[1])]
        if rest == "fold":
            return f"{at}.{fold}"
        if block := re.fullmatch(r"block(\d+)/(.+)", rest):
            return f"{at}.{fold + 1 + int(block[1])}.conv_block.{_BLOCK.get(block[2], block[2])}"
        if rest.startswith("squeeze/"):
            return f"{at}.{fold + 1 + blocks}.{_SQUEEZE[rest.removeprefix('squeeze/')]}"
        # Behind the blocks stand the squeeze, where there is one, and the change to a row.
        context = f"{at}.{fold + 2 + blocks + (widening != 1)}"
        rest = rest.removeprefix("context/")
        if mix := re.fullmatch(r"mix(\d)/(.+)", rest):
            return f"{context}.tcm.{mix[1]}.{_BLOCK[mix[2]]}"
        if rest.startswith("attend/"):
            return f"{context}.tcm.4.{_ATTEND[rest.removeprefix('attend/')]}"
        return f"{context}.{_CONTEXT[rest]}"

    return translate
