"""The cascade's one program against a plain Python cascade, trial by trial."""

import dataclasses
import math

import numpy as np
import pytest

from kmq_jax.cascade.policy import CascadePolicy, symmetric_gates
from kmq_jax.cascade.run import map_scores, prices, run, run_grid
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap

NEVER, LINE = (-math.inf, math.inf), AffineMap(1.0, 0.0)
THRESHOLD = 0.25


def made(gates, maps=(LINE, LINE, LINE), bits=(2, 3, 4), **more):
    return CascadePolicy(bits, maps, gates, THRESHOLD, **more)


def random_trials(trials=400, levels=3, utterances=60, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.uniform(-1, 1, (levels, trials)), 2).astype(np.float32)  # many ties, some on the threshold
    enrol, test = rng.integers(utterances, size=(2, trials))
    return scores, enrol, test


def plain(policy, mapped, enrol, test, one_table=True):
    """The cascade as a person would write it; returns bits, decisions, and every cost."""
    bits, accept = [], []
    sequential = {w: sum(policy.bits[: i + 1]) for i, w in enumerate(policy.bits)}
    for trial in mapped.T.tolist():
        for i, width in enumerate(policy.bits):
            if i == len(policy.gates) or not policy.gates[i][0] < trial[i] < policy.gates[i][1]:
                bits.append(width)
                accept.append(trial[i] >= policy.threshold)
                break
    needed = {}
    for width, e, t in zip(bits, enrol.tolist(), test.tolist()):
        for utterance in (e if one_table else ("enrol", e), t):
            needed[utterance] = max(needed.get(utterance, 0), width)
    return {
        "bits": bits,
        "accept": accept,
        "sequential_bits": np.mean([sequential[w] for w in bits]),
        "incremental_bits": np.mean(bits),
        "utterance_bits": np.mean([sequential[w] for w in needed.values()]),
        "utterance_incremental_bits": np.mean(list(needed.values())),
    }


@pytest.mark.parametrize("one_table", [True, False])
@pytest.mark.parametrize(
    "gates",
    [
        symmetric_gates(THRESHOLD, [0.5, 0.25]),
        ((0.0, 0.25), (-0.5, 0.75)),
        ((THRESHOLD, THRESHOLD), NEVER),
        (NEVER, (THRESHOLD, THRESHOLD)),
        (NEVER, NEVER),
        ((-math.inf, 0.5), (0.0, math.inf)),
    ],
)
def test_against_a_plain_cascade(gates, one_table):
    scores, enrol, test = random_trials()
    policy = made(gates)
    outcome = run(policy, scores, enrol, test, one_table)
    expected = plain(policy, scores, enrol, test, one_table)
    np.testing.assert_array_equal(outcome.bits, expected.pop("bits"))
    np.testing.assert_array_equal(outcome.accept, expected.pop("accept"))
    np.testing.assert_array_equal(outcome.score, np.take_along_axis(scores, outcome.level[None].astype(int), 0)[0])
    for name, value in expected.items():
        assert getattr(outcome, name) == pytest.approx(value, rel=1e-5), name
    assert outcome.resolved == pytest.approx({w: float(np.mean(outcome.bits == w)) for w in (2, 3, 4)})


def test_gates_of_zero_are_the_first_width_alone_and_of_infinity_the_last():
    scores, enrol, test = random_trials()
    scores[0, :50] = THRESHOLD  # on the threshold itself
    first = run(made(symmetric_gates(THRESHOLD, [0, 0])), scores, enrol, test)
    np.testing.assert_array_equal(first.accept, scores[0] >= THRESHOLD)
    assert (first.sequential_bits, first.incremental_bits, first.utterance_bits) == (2, 2, 2)
    last = run(made(symmetric_gates(THRESHOLD, [math.inf, math.inf])), scores, enrol, test)
    np.testing.assert_array_equal(last.accept, scores[-1] >= THRESHOLD)
    assert (last.sequential_bits, last.incremental_bits, last.utterance_bits) == (9, 4, 9)


def test_incremental_bits_never_exceed_the_top_width():
    scores, enrol, test = random_trials()
    for half in np.linspace(0, 1.5, 7):
        assert run(made(symmetric_gates(THRESHOLD, [half, half])), scores, enrol, test).incremental_bits <= 4


def test_prices():
    sequential, incremental = prices((2, 3, 4))
    assert (sequential.tolist(), incremental.tolist()) == ([2, 5, 9], [2, 3, 4])
    # Floating point does not nest in codebooks: it is read whole.
    assert [row.tolist() for row in prices((2, 4, 32))] == [[2, 6, 38], [2, 4, 36]]


def test_maps_equal_numpy_and_hit_knots_exactly():
    rng = np.random.default_rng(3)
    x = np.unique(rng.uniform(-1, 1, 50).astype(np.float32)).astype(np.float64)
    y = np.sort(rng.uniform(-1, 1, len(x)).astype(np.float32)).astype(np.float64)
    y[10:20] = y[10]  # a plateau
    maps = (IsotonicMap(x, y), IsotonicMap(np.array([0.5]), np.array([0.125])), AffineMap(2.0, -0.5))
    policy = made((NEVER, NEVER), maps)
    scores = np.concatenate([rng.uniform(-2, 2, 2000), x]).astype(np.float32)
    mapped = map_scores(policy, np.stack([scores] * 3))
    for row, fitted in zip(mapped, maps):
        np.testing.assert_allclose(row, fitted(scores), atol=3e-7)
    np.testing.assert_array_equal(mapped[0, 2000:], y.astype(np.float32))
    assert (np.diff(mapped[0][np.argsort(scores)]) >= -1e-7).all()


def test_one_width_and_one_trial():
    policy = CascadePolicy((4,), (LINE,), (), THRESHOLD)
    outcome = run(policy, [[0.3]], [0], [0])
    assert (outcome.accept.tolist(), outcome.bits.tolist(), outcome.utterance_bits) == ([True], [4], 4)


def test_enrolled_speakers_at_the_top_width():
    """Utterance 0 is enrolled, 1 and 2 are tested; only the second trial climbs."""
    scores = np.array([[0.9, 0.25, 0.0], [0.9, 0.9, 0.9], [0.9, 0.9, 0.9]], np.float32)[:, :2]
    policy = made(symmetric_gates(THRESHOLD, [0.125, 0.125]), enrolment="top")
    outcome = run(policy, scores, [0, 0], [1, 2])
    assert outcome.bits.tolist() == [2, 3]
    assert outcome.utterance_bits == pytest.approx((4 + 2 + 5) / 3)
    assert outcome.utterance_incremental_bits == pytest.approx((4 + 2 + 3) / 3)


@pytest.mark.parametrize("bits", [(2, 3, 4), (2, 4, 32)])
def test_an_utterance_on_both_sides_is_embedded_at_the_top_width_once(bits):
    """Every utterance is embedded at the levels up to the one it is taken to, and at the last if it is enrolled."""
    scores, enrol, test = random_trials(trials=40, utterances=30)
    policy = made(symmetric_gates(THRESHOLD, [0.3, 0.3]), bits=bits, enrolment="top", seconds=(1.0, 2.0, 8.0))
    outcome = run(policy, scores, enrol, test)
    levels = {utterance: {2} for utterance in enrol.tolist()}
    for utterance, level in zip(test.tolist(), outcome.level.tolist()):
        levels.setdefault(utterance, set()).update(range(level + 1))
    assert {frozenset(one) for one in levels.values()} >= {frozenset({2}), frozenset({0, 2}), frozenset({0, 1, 2})}
    embedded = [sorted(one) for one in levels.values()]
    assert outcome.utterance_bits == pytest.approx(np.mean([sum(bits[i] for i in one) for one in embedded]))
    assert outcome.utterance_seconds == pytest.approx(
        np.mean([sum(policy.seconds[i] for i in one) for one in embedded])
    )
    # New bits: the most of the codebooks, which nest, and all of floating point, which does not.
    codebooks = [max([bits[i] for i in one if bits[i] < 16], default=0) for one in embedded]
    whole = [32 * (bits[one[-1]] == 32) for one in embedded]
    assert outcome.utterance_incremental_bits == pytest.approx(np.mean(np.add(codebooks, whole)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_grid_equals_single_runs(shared):
    scores, enrol, test = random_trials(seed=4)
    rng = np.random.default_rng(5)
    maps = [
        tuple(IsotonicMap(np.array([-1.0, 0.1 * i, 1.0]), np.array([-1.0, 0.2 * i, 1.0])) for _ in range(3))
        for i in range(11)
    ]
    policies = [made(symmetric_gates(THRESHOLD, rng.uniform(0, 0.6, 2)), maps[0 if shared else i]) for i in range(11)]
    labels = rng.random(scores.shape[1]) < 0.5
    reference = scores[-1] + 0.1 * rng.standard_normal(scores.shape[1]) >= THRESHOLD
    grid = run_grid(policies, scores, enrol, test, reference, labels)
    for i, policy in enumerate(policies):
        one = run(policy, scores, enrol, test)
        np.testing.assert_allclose(grid["resolved"][i], list(one.resolved.values()), atol=1e-6)
        for name in ("sequential_bits", "incremental_bits", "utterance_bits"):
            assert grid[name][i] == pytest.approx(getattr(one, name), rel=1e-6)
        harmful = (reference == labels) & (one.accept != labels)
        assert grid["harmful_flip_rate"][i] == pytest.approx(harmful.mean(), abs=1e-6)


def test_mistakes():
    scores, enrol, test = random_trials()
    policy = made((NEVER, NEVER))
    with pytest.raises(UserError, match="as many rows of scores"):
        run(policy, scores[:2], enrol, test)
    with pytest.raises(UserError, match="400 trials do not fit"):
        run(policy, scores, enrol[:3], test)
    scores[1, 7] = np.nan
    with pytest.raises(UserError, match="finite"):
        run(policy, scores, enrol, test)
    with pytest.raises(UserError, match="same bits"):
        other = dataclasses.replace(policy, enrolment="top")
        run_grid([policy, other], scores, enrol, test, test > 0, test > 0)


def test_from_the_last_knot_on_scores_are_exactly_its_value():
    """In float32, y0 + (y1 - y0) is a step below y1; two knots fill a table of a power of two."""
    fitted = IsotonicMap(np.array([0.0, 1.0]), np.array([-0.994523, 0.6317071]))
    policy = CascadePolicy((2,), (fitted,), (), threshold=0.6317071)
    scores = np.float32([[1.0, 2.0, 0.99]])
    assert run(policy, scores, [0, 1, 2], [3, 4, 5]).accept.tolist() == [True, True, False]
    np.testing.assert_array_equal(map_scores(policy, scores)[0, :2], np.float32([0.6317071] * 2))
