"""Slow, exact references and real weights for the tests of quantization."""

import numpy as np


def optimal_inertia(values, k):
    """The least inertia of k clusters: dynamic programming over every border, by divide and conquer, in float64."""
    x = np.sort(np.asarray(values, np.float64))
    x -= x.mean()
    n = len(x)
    first, second = np.r_[0, np.cumsum(x)], np.r_[0, np.cumsum(x * x)]

    def cost(i, j):
        return second[j] - second[i] - (first[j] - first[i]) ** 2 / np.maximum(j - i, 1)

    best = np.full(n + 1, np.inf)
    best[0] = 0
    for _ in range(k):
        fresh = np.full(n + 1, np.inf)
        stack = [(0, n, 0, n)]
        while stack:
            low, high, a, b = stack.pop()
            if low > high:
                continue
            middle = (low + high) // 2
            i = np.arange(a, min(middle, b) + 1)
            total = best[i] + cost(i, middle)
            at = int(np.argmin(total))
            fresh[middle] = total[at]
            stack += [(low, middle - 1, a, i[at]), (middle + 1, high, i[at], b)]
        best = fresh
    return best[n]


def brute_inertia(values, centroids, weights=None):
    """The inertia by comparing every value with every centroid."""
    error = np.min(np.subtract.outer(np.float64(values), np.float64(centroids)) ** 2, axis=-1)
    return float(np.sum(error if weights is None else error * weights))


def real_kernels(shared):
    """`{name: [out channels, n]}` of the convolutions and the linear layer of a real speaker network."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(shared / "models" / "wespeaker-voxceleb-resnet34.onnx"))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: a.reshape(a.shape[0], -1) for name, a in arrays.items() if a.ndim >= 2 and a.size > 256}
