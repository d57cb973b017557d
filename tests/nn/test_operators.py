"""Operators against ONNX Runtime, in numpy and in JAX."""

import jax
import numpy as np
import pytest

from kmq_jax.nn import operators

onnx = pytest.importorskip("onnx", reason="the reference is ONNX Runtime")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
from onnx import helper  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 5)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 3, 7, 6)).astype(np.float32)
ROW = RNG.normal(size=3).astype(np.float32)
N = np.arange(-3, 9).reshape(3, 4)


def ints(*values):
    return np.array(values, np.int64)


CASES = [
    *((kind, [X], {}) for kind in ("Relu", "Sigmoid", "Tanh", "Erf", "Softplus", "Softsign", "Exp", "Neg", "Abs")),
    *((kind, [X], {}) for kind in ("Sign", "Floor", "Ceil", "Round", "Reciprocal", "HardSwish", "HardSigmoid", "Elu")),
    *((kind, [X], {}) for kind in ("Sin", "Cos", "IsNaN", "Mish", "GlobalAveragePool", "GlobalMaxPool", "Size")),
    *((kind, [np.abs(X)], {}) for kind in ("Sqrt", "Log")),
    *((kind, [X, ROW.reshape(3, 1)], {}) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "PRelu")),
    *((kind, [X, ROW.reshape(3, 1)], {}) for kind in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Equal")),
    *((kind, [X > 0, X > 1], {}) for kind in ("And", "Or", "Xor")),
    ("LeakyRelu", [X], {"alpha": 0.2}),
    ("Not", [X > 0], {}),
    ("Pow", [np.abs(X), np.float32(1.5)], {}),
    ("Pow", [X, np.float32(2)], {}),
    ("Div", [N, ints(2)], {}),
    ("Mod", [N, ints(3)], {}),
    ("Where", [X > 0, X, np.float32(2).reshape(1)], {}),
    ("Clip", [X, np.float32(-0.5), np.float32(0.5)], {}),
    *((f"Reduce{kind}", [X, ints(-1)], {}) for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2")),
    *((f"Reduce{kind}", [np.abs(X), ints(0, 2)], {"keepdims": 0}) for kind in ("SumSquare", "LogSum", "LogSumExp")),
    ("ReduceSum", [X], {}),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    ("ReduceSumSquare", [X], {"noop_with_empty_axes": 1}),
    *((f"Reduce{kind}", [np.abs(N), ints(1)], {}) for kind in ("Mean", "Max", "L2")),
    ("Concat", [X, X], {"axis": -2}),
    ("Shape", [X], {"start": 1}),
    ("Gather", [X, ints(-1, 0)], {"axis": 1}),
    ("GatherElements", [X, np.array([[[0, -1]]] * 2)], {"axis": 2}),
    ("Slice", [X, ints(1), ints(-1), ints(2)], {}),
    ("Slice", [X, ints(-1), ints(-(1 << 40)), ints(2), ints(-2)], {}),
    ("Split", [X, ints(2, 3)], {"axis": 2}),
    ("Split", [X], {"axis": -1, "num_outputs": 2}),
    ("Squeeze", [X[:, :1], ints(-2)], {}),
    ("Unsqueeze", [X, ints(0, -1)], {}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Reshape", [X, ints(0, -1)], {}),
    ("Flatten", [IMAGE], {"axis": -2}),
    ("Expand", [ROW, ints(2, 1)], {}),
    ("Tile", [X, ints(1, 2, 3)], {}),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}),
    ("Pad", [X, ints(0, 1, 0, 2), np.float32(7), ints(0, -1)], {}),
    ("Pad", [X, ints(0, 0, 2, 0, 0, 3)], {"mode": "reflect"}),
    ("Pad", [X, ints(0, 0, 2, 0, 0, 3)], {"mode": "edge"}),
    ("MatMul", [X, RNG.normal(size=(2, 5, 4)).astype(np.float32)], {}),
    ("Gemm", [X[0], X[1], ROW], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Einsum", [X, X], {"equation": "btf,bsf->bts"}),
    ("CumSum", [X, ints(1)], {}),
    ("Softmax", [X], {"axis": 1}),
    ("LogSoftmax", [X], {}),
    ("InstanceNormalization", [X, ROW, ROW], {"epsilon": 1e-3}),
    ("LayerNormalization", [X, X[0, 0], X[1, 1]], {}),
    ("LpNormalization", [X], {"axis": 1}),
    *(("LpNormalization", [np.float32([[3, 4], [0, 0]])], {"p": p}) for p in (1, 2)),
    ("DequantizeLinear", [N.astype(np.int8), np.abs(ROW), np.int8([0, 1, 2])], {"axis": 0}),
    ("QuantizeLinear", [X, np.float32(0.1), np.uint8(120)], {}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
    ("AveragePool", [X], {"kernel_shape": [3], "strides": [3], "ceil_mode": 1}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1}),
    ("MaxPool", [X], {"kernel_shape": [2], "dilations": [2]}),
]


@pytest.mark.parametrize(("kind", "inputs", "attributes"), CASES, ids=lambda one: one if isinstance(one, str) else "")
def test_operators_give_what_onnx_runtime_gives(kind, inputs, attributes):
    inputs = [np.asarray(one) for one in inputs]
    names, outputs = [f"x{i}" for i in range(len(inputs))], ["y0", "y1"] if kind == "Split" else ["y0"]
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, inputs)
    ]
    nodes = [helper.make_node(kind, names, outputs, **attributes)]
    graph = helper.make_graph(nodes, "g", values, [onnx.ValueInfoProto(name=name) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, dict(zip(names, inputs)))
    found = operators.compute(kind, inputs, attributes, 1 << 20)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-6)
    if inputs[0].dtype == np.float32:  # in JAX, where only the first input depends on the sound
        traced = jax.jit(lambda x: operators.compute(kind, [x, *inputs[1:]], attributes, 1 << 20))(inputs[0])
        for ours, theirs in zip(traced, wanted):
            np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-6)


def test_a_flat_softmax_has_a_logarithm_where_it_is_zero_itself():
    (found,) = operators.compute("LogSoftmax", [np.float32([[0, -200, 0]])], {"axis": 1, "flat": 1}, 100)
    np.testing.assert_allclose(found, [[-np.log(2), -200 - np.log(2), -np.log(2)]], rtol=1e-6)


def test_every_operator_is_compared_or_is_a_cast():
    assert operators.KINDS - {case[0] for case in CASES} == {"Cast"}


def test_what_depends_on_shapes_alone_stays_known():
    seen = []

    def shapes(x):
        (size,) = operators.compute("Shape", [x], {}, 100)
        (last,) = operators.compute("Gather", [size, np.array([2])], {}, 100)
        (shape,) = operators.compute("Concat", [np.array([-1]), last], {"axis": 0}, 100)
        seen.append(shape)
        return operators.compute("Reshape", [x, shape], {}, 100)[0]

    assert jax.jit(shapes)(X).shape == (6, 5) and seen[0].tolist() == [-1, 5]


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "message"),
    [
        ("Add", [np.zeros((9, 1)), np.zeros((1, 9))], {}, r"values of shape \(9, 9\)"),
        ("MatMul", [np.zeros((9, 1)), np.zeros((1, 9))], {}, r"values of shape \(9, 9\)"),
        ("Tile", [np.zeros(9), np.array([9])], {}, r"values of shape \(81,\)"),
        ("Range", [np.int64(0), np.int64(99), np.int64(1)], {}, r"values of shape \(99,\)"),
        ("Gather", [np.zeros(3), np.array([3])], {}, "outside an axis of 3"),
        ("ReduceSum", [np.zeros(3), np.array([2])], {}, "axis 2 is outside 1 axes"),
        ("Pad", [np.zeros(3), np.array([3, 0])], {"mode": "reflect"}, "does not fit"),
        ("Pad", [np.zeros(3), np.array([0, -4])], {}, r"cut away more than there is of \(3,\)"),
        ("Pad", [np.zeros(3), np.array([-2, -2])], {}, "cut away more"),
        ("Flatten", [np.zeros((2, 2))], {"axis": -3}, "axis -3 is outside 2 axes"),
        ("Softmax", [np.zeros((2, 2, 2))], {"axis": 1, "flat": 1}, "before operator set 13"),
        ("Cast", [np.zeros(3)], {"to": "string"}, "type 'string' is not supported"),
    ],
)
def test_what_is_refused(kind, inputs, attributes, message):
    with pytest.raises(ValueError, match=message):
        operators.compute(kind, [np.asarray(one) for one in inputs], attributes, 64)
