"""Checkpoints of WeSpeaker's and Kiwano's networks: their names and shapes, with weights that a formula gives.

The same formula filled the original code's networks when tests/interop/golden.json was made, so that a few numbers of
output are enough to compare with.
"""

import collections
import io
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def _norm(name: str, channels: int) -> Shapes:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def wespeaker_shapes(blocks, width=32, bottleneck=False, features=80, embedding=256) -> Shapes:
    """Tensors of wespeaker.models.resnet.ResNet, one embedding layer, pooling TSTP."""
    expansion = 4 if bottleneck else 1
    shapes: Shapes = {"conv1.weight": (width, 1, 3, 3), **_norm("bn1", width)}
    channels_in = width
    for stage, count in enumerate(blocks):
        inner = width << stage
        for n in range(count):
            at = f"layer{stage + 1}.{n}"
            taps = [(inner, 1), (inner, 3), (4 * inner, 1)] if bottleneck else [(inner, 3), (inner, 3)]
            before = channels_in
            for i, (channels, size) in enumerate(taps, 1):
                shapes[f"{at}.conv{i}.weight"] = (channels, before, size, size)
                shapes |= _norm(f"{at}.bn{i}", channels)
                before = channels
            if (n == 0 and stage > 0) or channels_in != expansion * inner:
                shapes[f"{at}.shortcut.0.weight"] = (expansion * inner, channels_in, 1, 1)
                shapes |= _norm(f"{at}.shortcut.1", expansion * inner)
            channels_in = expansion * inner
    shapes["seg_1.weight"] = (embedding, 2 * channels_in * (features // 8))
    shapes["seg_1.bias"] = (embedding,)
    return shapes


def kiwano_shapes(blocks, width=128, last_taps=3, embedding=256, classes=5, prefixed=True) -> Shapes:
    """Tensors of kiwano.model.resnet.KiwanoResNet (`last_taps` 3) and of the ResNet before it (1)."""
    stem, pool, head = ("preresnet.", "temporal_pooling.", "embedding.") if prefixed else ("", "", "")
    shapes: Shapes = {f"{stem}pre_conv1.weight": (width, 1, 3, 3), **_norm(f"{stem}pre_bn1", width)}
    before = width
    for stage, (count, channels) in enumerate(zip(blocks, (width, width, 2 * width, 2 * width))):
        for n in range(count):
            at = f"{stem}layer{stage + 1}.{n}"
            for i, (size, inputs) in enumerate([(3, before), (3, channels), (last_taps, channels)], 1):
                shapes[f"{at}.conv{i}.weight"] = (channels, inputs, size, size)
                shapes |= _norm(f"{at}.bn{i}", inputs)
            if stage < 2:
                for fc in ("se.fc.0", "se.fc.2"):
                    shapes |= {f"{at}.{fc}.weight": (channels, channels), f"{at}.{fc}.bias": (channels,)}
            if n == 0 and stage > 0:
                shapes[f"{at}.downsample.0.weight"] = (channels, before, 1, 1)
                shapes |= _norm(f"{at}.downsample.1", channels)
            before = channels
    frame = 11 * before
    shapes |= {f"{pool}attention.0.weight": (before // 2, frame, 1), f"{pool}attention.0.bias": (before // 2,)}
    shapes |= {f"{pool}attention.2.weight": (frame, before // 2, 1), f"{pool}attention.2.bias": (frame,)}
    shapes |= _norm(f"{head}norm_stats", 2 * frame)
    shapes |= {f"{head}fc_embed.weight": (embedding, 2 * frame), f"{head}fc_embed.bias": (embedding,)}
    shapes |= _norm(f"{head}norm_embed", embedding)
    return shapes | {"output.W": (classes, embedding)}


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that look random and depend on nothing but their place and `name`, float64."""
    place = np.arange(int(np.prod(shape)), dtype=np.float64) + zlib.crc32(name.encode()) % 9973
    return np.modf(np.abs(np.sin(place * 12.9898) * 43758.5453))[0].reshape(shape)


def fill(shapes: Shapes) -> dict[str, np.ndarray]:
    """A checkpoint whose activations stay near 1 at any depth."""
    tensors = {}
    for name, shape in shapes.items():
        u = uniform(name, shape)
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7, np.int64)
        elif len(shape) > 1:
            fan_in = int(np.prod(shape[1:]))
            tensors[name] = ((u - 0.5) * np.sqrt(12.0 / fan_in)).astype(np.float32)
        elif name.endswith(("running_var", "weight")):
            tensors[name] = (0.3 + 0.5 * u if name.endswith("weight") else 0.7 + 0.6 * u).astype(np.float32)
        else:
            tensors[name] = (0.4 * (u - 0.5)).astype(np.float32)
    return tensors


def features(batch: int, frames: int, size: int) -> np.ndarray:
    """Made-up features `[batch, frames, size]`, float32."""
    return (4 * uniform("features", (batch, frames, size)) - 2).astype(np.float32)


def digest(shapes: Shapes) -> str:
    """A checksum of names and shapes, in any order."""
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"


def summary(embedding: np.ndarray, stages) -> dict[str, list[float]]:
    """The numbers that golden.json keeps: the first eight of each embedding, and three of each stage's output.

    Args:
        embedding: `[batch, size]`.
        stages: four outputs `[batch, time, freq, channel]`.
    """
    picked = []
    for x in map(np.asarray, stages):
        picked += [x[0, 0, 0, 0], x[-1, 1, -1, 1], np.mean(x, dtype=np.float64)]
    return {"embedding": np.asarray(embedding)[:, :8].ravel().tolist(), "stages": [float(v) for v in picked]}


def torch_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a plain state dict that PyTorch saved, read without PyTorch: contiguous ones, no other objects."""
    with zipfile.ZipFile(path) as file:
        inside = {name.partition("/")[2]: name for name in file.namelist()}

        class Plain(pickle.Unpickler):
            def find_class(self, module, name):
                known = {"OrderedDict": collections.OrderedDict, "_rebuild_tensor_v2": rebuild}
                known |= {"FloatStorage": np.float32, "LongStorage": np.int64}
                return known[name]  # anything else is no plain state dict

            def persistent_load(self, pid):
                return np.frombuffer(file.read(inside[f"data/{pid[2]}"]), pid[1])

        def rebuild(storage, offset, shape, strides, *_):
            contiguous = np.cumprod([1, *shape[:0:-1]])[::-1][: len(shape)].tolist()
            assert list(strides) == contiguous
            return storage[offset : offset + int(np.prod(shape))].reshape(shape)

        return dict(Plain(io.BytesIO(file.read(inside["data.pkl"]))).load())
