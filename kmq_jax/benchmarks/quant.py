"""k-means of every layer of a network beside scikit-learn and a sort, and the speed of (fake) quantization."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks.options import QuantBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians, write_figures
from kmq_jax.core.tree import Params, named_leaves
from kmq_jax.models import registry


def kernels(network: str, layers: int = 0) -> dict[str, np.ndarray]:
    """Weights in the shapes of a network's kernels, with the heavy tails that trained ones have."""
    params = registry.shapes(registry.build(network))["params"]
    rng = np.random.default_rng(0)
    shapes = [(name, leaf.shape) for name, leaf in named_leaves(params) if leaf.ndim >= 2]
    chosen = shapes[: layers or None]
    return {name: 0.02 * rng.standard_t(6, shape).astype(np.float32) for name, shape in chosen}


def clustering(weights: dict[str, np.ndarray], bits: int, channels: int, repeats: int) -> Figures:
    """Seconds of k-means of all rows, of sorting them by XLA and by numpy, and of a subset beside scikit-learn.

    The ratio of inertias is left out where no channel has more weights than centroids: both are then exact.
    """
    from sklearn.cluster import KMeans

    rows = [np.ascontiguousarray(w.reshape(-1, w.shape[-1]).T) for w in weights.values()]  # [channels, weights]
    some = [r[:channels] for r in rows]
    sort = jax.jit(lambda x: jnp.sort(x, axis=-1))
    seconds = medians(
        in_turns(
            {
                "kmeans": lambda: [quant.kmeans(r, 1 << bits) for r in rows],
                "jnp_sort": lambda: [sort(r) for r in rows],
                "np_sort": lambda: [np.sort(r, axis=-1) for r in rows],
                "subset_kmeans": lambda: [quant.kmeans(r, 1 << bits) for r in some],
            },
            repeats,
        )
    )

    def peer() -> list[float]:
        found = []
        for row in (row for r in some for row in r):
            k = min(1 << bits, len(np.unique(row)))  # scikit-learn refuses more clusters than points
            found.append(KMeans(k, n_init=10, random_state=0).fit(row[:, None]).inertia_)
        return found

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer()
    seconds["subset_sklearn"] = time.perf_counter() - start
    ours = [float(x) for r in some for x in quant.inertia(r, quant.kmeans(r, 1 << bits))]
    total = sum(theirs)
    return {
        **seconds,
        "weights": sum(r.size for r in rows),
        "channels": sum(len(r) for r in rows),
        "subset_channels": sum(len(r) for r in some),
        "speedup_over_sklearn": seconds["subset_sklearn"] / seconds["subset_kmeans"],
        "times_jnp_sort": seconds["kmeans"] / seconds["jnp_sort"],
        "times_np_sort": seconds["kmeans"] / seconds["np_sort"],
        **({"inertia_over_sklearn": sum(ours) / total} if total else {}),
    }


def throughput(weights: dict[str, np.ndarray], bits: int, repeats: int) -> dict[str, float]:
    """GB/s of float32 weights produced by dequantize, by fake-quantize (forward, and with gradients) and by a copy."""
    params = {name: jnp.asarray(w) for name, w in weights.items()}
    # A start without iterations: only the speed afterwards counts here.
    spec = quant.QuantSpec(bits, init="companding", iterations=0)
    latents, books = quant.init_codebooks(params, spec)
    packed = quant.pack(latents, books)
    held = quant.reassign(latents, books)  # with indices, so that no nearest centroid is searched

    def loss(state: tuple[Params, dict[str, quant.Codebook]]) -> jax.Array:
        return sum((jnp.vdot(w, w) for w in quant.fake_quantize(*state).values()), jnp.array(0.0))

    copy = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree))  # reads and writes every weight once
    dequantize, fake = jax.jit(quant.dequantize_params), jax.jit(quant.fake_quantize)
    gradient = jax.jit(jax.grad(loss))
    seconds = medians(
        in_turns(
            {
                "copy": lambda: copy(params),
                "dequantize": lambda: dequantize(packed),
                "fake_quantize": lambda: fake(latents, books),
                "fake_quantize_cached": lambda: fake(latents, held),
                "fake_quantize_gradient": lambda: gradient((latents, books)),
            },
            repeats,
        )
    )
    size = sum(w.nbytes for w in weights.values())
    return {f"{name}_gb_per_second": size / 1e9 / value for name, value in seconds.items()}


def step(bits: int, repeats: int) -> dict[str, float]:
    """Seconds of forward and backward of resnet36, 16 utterances of 200 frames, on plain and on quantized weights."""
    model = registry.build("resnet36")
    features = jnp.asarray(np.random.default_rng(0).standard_normal((16, 200, model.features)).astype(np.float32))
    variables = registry.initialize(model, jax.random.key(0))
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}
    spec = quant.QuantSpec(bits, init="companding", iterations=0)
    latents, books = quant.init_codebooks(params, spec)

    def loss(params: Params) -> jax.Array:
        embedding, _ = model.apply({"params": params, **rest}, features, None, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(embedding))

    plain = jax.jit(jax.grad(loss))
    quantized = jax.jit(jax.grad(lambda state: loss(quant.fake_quantize(*state))))
    seconds = medians(
        in_turns({"plain": lambda: plain(params), "quantized": lambda: quantized((latents, books))}, repeats)
    )
    return {
        "step_plain": seconds["plain"],
        "step_quantized": seconds["quantized"],
        "step_overhead": seconds["quantized"] / seconds["plain"] - 1,
    }


def main(options: QuantBench) -> None:
    """Runs the benchmark and prints its figures."""
    weights = kernels(options.network, options.layers)
    figures = clustering(weights, options.bits, options.channels, options.repeats)
    ratio = figures.get("inertia_over_sklearn")
    print(
        f"k-means of {figures['weights'] / 1e6:.1f} M weights of {options.network}, {figures['channels']} channels,"
        f" {options.bits} bits: {figures['kmeans']:.2f} s\n"
        f"  one sort of them: jnp.sort {figures['jnp_sort']:.2f} s (k-means takes {figures['times_jnp_sort']:.2f}"
        f" times that), np.sort {figures['np_sort']:.2f} s ({figures['times_np_sort']:.1f} times)\n"
        f"  scikit-learn (n_init=10) on {figures['subset_channels']} of the channels:"
        f" {figures['subset_sklearn']:.1f} s, k-means {figures['subset_kmeans']:.2f} s on the same:"
        f" {figures['speedup_over_sklearn']:.0f} times faster, "
        + ("inertia 0 on both sides" if ratio is None else f"inertia {ratio:.4f} of theirs")
    )
    speed = throughput(kernels("resnet36"), options.bits, options.repeats)
    listed = ", ".join(f"{name.removesuffix('_gb_per_second')} {value:.2f}" for name, value in speed.items())
    print(f"GB/s of float32 weights of resnet36: {listed}")
    figures |= speed
    if options.step:
        figures |= step(options.bits, options.repeats)
        print(
            f"training step of resnet36, 16 x 200 frames: {figures['step_plain']:.2f} s, quantized"
            f" {figures['step_quantized']:.2f} s: {100 * figures['step_overhead']:+.1f} %"
        )
    if options.json:
        write_figures(options.json, "quant", figures)
