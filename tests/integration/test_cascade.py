"""`calibrate` and `cascade` on simulated bits: figures against a plain count, refusals, both rules."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import arrays_of
from sklearn.metrics.pairwise import cosine_similarity

from kmq_jax.cascade import evaluate
from kmq_jax.cascade.fit import Calibration, split_speakers
from kmq_jax.cascade.policy import read_policy
from kmq_jax.cli import calibrate, cascade
from kmq_jax.core.errors import UserError
from kmq_jax.metrics import detection
from kmq_jax.scoring.levels import score_levels

SPEAKERS, EACH, DIM = 24, 6, 24
COSINES = {2: 0.9, 3: 0.96, 4: 0.985, 32: 1.0}


def write_tables(directory, prefix, seed=0, speakers=SPEAKERS, **changes):
    """Embeddings of a reference and of three levels that differ from it by noise; returns ids and their speakers."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(speakers), EACH)
    rows = rng.standard_normal((speakers, DIM))[owner] + 0.75 * rng.standard_normal((len(owner), DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = [f"{prefix}{s:02d}-{i % EACH}" for i, s in enumerate(owner)]
    for bits, cosine in COSINES.items():
        noise = rng.standard_normal(rows.shape)
        noise *= np.sqrt(1 / cosine**2 - 1) / np.linalg.norm(noise, axis=1, keepdims=True)
        arrays = {
            "ids": np.array(ids),
            "paths": np.array([f"{name}.wav" for name in ids]),
            "speakers": np.array([name.split("-")[0] for name in ids]),
            "embeddings": (rows + noise).astype(np.float32),
            "model": np.array(f"model{bits}"),
        } | changes
        order = rng.permutation(len(ids))  # files need not agree in their order
        shuffled = {name: value[order] if value.shape else value for name, value in arrays.items()}
        np.savez(directory / f"{prefix}{bits}.npz", **shuffled)
    return ids


def write_trials(path, ids, share=1.0, keep=None):
    rng = np.random.default_rng(1)
    one, two = np.triu_indices(len(ids), 1)
    labels = one // EACH == two // EACH
    kept = labels | (rng.random(len(one)) < 0.3 * share)
    kept &= labels == keep if keep is not None else True
    lines = [f"{int(y)} {ids[a]} {ids[b]}\n" for a, b, y in zip(one[kept], two[kept], labels[kept])]
    path.write_text("".join(lines))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in this process; returns what it printed."""

    def call(command, *words, **given):
        words = [*words, *(f"--{name}={value}" for name, value in given.items())]
        monkeypatch.setattr(sys, "argv", [command.__name__, *words])
        command.main()
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    for prefix, seed in (("dev", 0), ("new", 1)):
        write_trials(tmp_path / f"{prefix}.txt", write_tables(tmp_path, prefix, seed))
    return call


def stages(prefix, levels=(2, 3, 4)):
    return [f"--stage={bits}:{prefix}{bits}.npz" for bits in levels]


def scores_of(path, rows):
    """Cosine of each trial in a CSV's rows, straight from the file."""
    table = arrays_of(path)
    row = {name: i for i, name in enumerate(table["ids"])}
    similarity = cosine_similarity(table["embeddings"])
    return similarity[[row[r["enrol"]] for r in rows], [row[r["test"]] for r in rows]]


def test_both_commands(run, tmp_path):
    told = run(calibrate, *stages("dev"), reference="dev32.npz", trials="dev.txt", out="p.json").out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    policy = read_policy(tmp_path / "p.json")
    assert policy.bits == (2, 3, 4)
    assert policy.models == ("model2", "model3", "model4")
    assert f"threshold {policy.threshold:.4f}" in told
    text = json.loads((tmp_path / "p.json").read_text())
    assert text["version"] == 1
    assert len(text["notes"]["levels"]["2"]["sha256"]) == 64
    assert text["notes"]["threshold_ci95"][0] < policy.threshold < text["notes"]["threshold_ci95"][1]
    assert text["notes"]["here"]["harmful_flip_rate"] <= max(0.001, text["notes"]["at_most"])
    front = text["notes"]["front"]
    assert all(a["sequential_bits"] < b["sequential_bits"] for a, b in zip(front, front[1:]))
    assert all(a["harmful_flip_rate"] > b["harmful_flip_rate"] for a, b in zip(front, front[1:]))
    chosen = front[text["notes"]["chosen"]]
    assert chosen["sequential_bits"] == pytest.approx(text["notes"]["here"]["sequential_bits"], rel=1e-6)

    given = {"policy": "p.json", "trials": "new.txt", "out": "d.csv", "json": "c.json", "replicates": 50}
    told = run(cascade, *stages("new"), reference="new32.npz", **given).out
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["enrol", "test", "score", "decision", "bits"]
    listed = [line.split() for line in (tmp_path / "new.txt").read_text().splitlines()]
    assert [(r["enrol"], r["test"]) for r in rows] == [(e, t) for _, e, t in listed]

    # The same cascade in double precision, straight from the files.
    labels = np.array([label == "1" for label, _, _ in listed])
    reference = scores_of(tmp_path / "new32.npz", rows)
    mapped = [fitted(scores_of(tmp_path / f"new{b}.npz", rows)) for b, fitted in zip(policy.bits, policy.maps)]
    expected = np.full(len(rows), 4)
    for i in (1, 0):
        low, high = policy.gates[i]
        expected = np.where((low < mapped[i]) & (mapped[i] < high), expected, policy.bits[i])
    bits = np.array([int(r["bits"]) for r in rows])
    assert (bits != expected).mean() < 0.002  # rounding at a gate's edge
    score = np.choose(bits - 2, mapped)
    np.testing.assert_allclose([float(r["score"]) for r in rows], score, atol=1e-5)
    decision = np.array([r["decision"] == "1" for r in rows])

    figures = json.loads((tmp_path / "c.json").read_text())
    written = np.array([float(r["score"]) for r in rows])
    np.testing.assert_array_equal(decision, written >= policy.threshold)
    assert figures["eer"] == pytest.approx(100 * detection.eer(written, labels)[0])
    assert figures["min_dcf"] == pytest.approx(detection.min_dcf(written, labels))
    assert figures["reference_eer"] == pytest.approx(100 * detection.eer(reference, labels)[0], abs=0.05)
    assert figures["resolved"] == pytest.approx({str(b): float(np.mean(bits == b)) for b in (2, 3, 4)}, abs=1e-6)
    right = (reference >= policy.threshold) == labels
    assert figures["harmful_flip_rate"] == pytest.approx(np.mean(right & (decision != labels)), abs=2 / len(rows))
    nearest = np.argsort(abs(reference - policy.threshold))[: len(rows) // 10]  # bands end at 10 %
    found = [band["harmful_flip_rate"] for band in figures["remaining_flips"] if band["nearest"][1] <= 10]
    for width in (2, 3, 4):
        wrong = (right & (decision != labels) & (bits == width))[nearest].sum() / len(rows)
        assert sum(rates[str(width)] for rates in found) == pytest.approx(wrong, abs=2 / len(rows))
    everywhere = sum(rate for band in figures["remaining_flips"] for rate in band["harmful_flip_rate"].values())
    assert everywhere == pytest.approx(figures["harmful_flip_rate"])
    reach = {b: np.mean(bits >= b) for b in (3, 4)}
    assert figures["sequential_bits"] == pytest.approx(2 + 3 * reach[3] + 4 * reach[4], rel=1e-5)
    assert figures["incremental_bits"] == pytest.approx(bits.mean(), rel=1e-5)
    assert figures["incremental_bits"] <= figures["utterance_bits"] <= 9
    assert figures["eer_ci95"][0] < figures["eer"] < figures["eer_ci95"][1]
    changes = figures["changes"]  # against full precision, and against 2 bits by their own scores
    assert changes["reference"]["eer_change"] == pytest.approx(figures["eer"] - figures["reference_eer"])
    assert changes["first"]["eer_change"] == pytest.approx(
        figures["eer"] - figures["each_level_alone"]["2"]["eer"], abs=0.5
    )
    assert all(one["eer_change_ci95"][0] <= one["eer_change_ci95"][1] for one in changes.values())
    assert figures["resolved"]["2"] > 0.5
    assert "cascade" in told


def test_the_last_stage_may_be_the_reference(run, tmp_path):
    levels = (2, 32)
    run(calibrate, *stages("dev", levels), reference="dev32.npz", trials="dev.txt", out="p.json", alpha=0.002)
    run(cascade, *stages("new", levels), reference="new32.npz", policy="p.json", trials="new.txt", json="c.json")
    figures = json.loads((tmp_path / "c.json").read_text())
    alone = figures["each_level_alone"]
    assert alone["32"]["harmful_flip_rate"] == 0
    assert figures["harmful_flip_rate"] < alone["2"]["harmful_flip_rate"] / 2
    assert figures["sequential_bits"] == pytest.approx(2 + 32 * figures["resolved"]["32"], rel=1e-5)


def test_risk_rule(run, tmp_path):
    given = {"reference": "dev32.npz", "trials": "dev.txt", "out": "p.json", "rule": "risk"}
    told = run(calibrate, *stages("dev", (2, 32)), alpha=0.05, **given)
    notes = read_policy(tmp_path / "p.json").notes
    assert notes["rate"] <= notes["upper_bounds"]["survey"] <= 0.05
    assert (notes["certifying_speakers"], notes["kept"] > 0) == (SPEAKERS // 2, True)
    assert "promise (approximate): harmful flips" in told.out and "proven for these gates" in told.out
    assert notes["approximate"] and notes["upper_bounds"]["survey"] < notes["proven_upper_bound"]
    assert notes["kept_by"]["survey"] == notes["kept"] > notes["kept_by"]["hoeffding-bentkus"] == 0
    assert notes["speakers_needed"]["hoeffding-bentkus"] > SPEAKERS // 2
    assert notes["with_last_level"]["rate"] >= notes["rate"]
    ids = arrays_of(tmp_path / "dev2.npz")["ids"]
    listed = np.loadtxt(tmp_path / "dev.txt", dtype=str)
    assert notes["target_share"] == pytest.approx((listed[:, 0] == "1").mean()) and len(ids)
    # Maps and threshold are of the speakers that are not kept apart, and so is the threshold's interval.
    joined = score_levels([(2, "dev2.npz"), (32, "dev32.npz")], "dev32.npz", "dev.txt")
    sides = joined.sides.enrol_speaker, joined.sides.test_speaker
    rows = Calibration((2, 32), joined.scores, joined.reference, np.arange(len(listed)), *sides)
    design, _ = split_speakers(rows, share=0.5, seed=0)
    (tmp_path / "design.txt").write_text("".join(f"{' '.join(listed[row])}\n" for row in design.labels))
    run(calibrate, *stages("dev", (2, 32)), reference="dev32.npz", trials="design.txt", out="own.json")
    policy, own = read_policy(tmp_path / "p.json"), read_policy(tmp_path / "own.json")
    assert (policy.threshold, notes["threshold_ci95"]) == (own.threshold, own.notes["threshold_ci95"])
    # Twelve speakers cannot promise one in a thousand without assumptions: nobody may stop early.
    told = run(calibrate, *stages("dev", (2, 32)), alpha=0.001, bound="hoeffding-bentkus", **given)
    assert "warning: no gates keep the promise" in told.err and "promise (proven)" in told.out
    assert read_policy(tmp_path / "p.json").gates == ((-np.inf, np.inf),)


def test_enrolled_speakers_at_the_top_width(run, tmp_path):
    run(calibrate, *stages("dev"), reference="dev32.npz", trials="dev.txt", out="p.json", enrolment="top")
    assert read_policy(tmp_path / "p.json").enrolment == "top"
    run(cascade, *stages("new"), reference="new32.npz", policy="p.json", trials="new.txt", json="top.json")
    run(calibrate, *stages("dev"), reference="dev32.npz", trials="dev.txt", out="p.json")
    run(cascade, *stages("new"), reference="new32.npz", policy="p.json", trials="new.txt", json="each.json")
    top, each = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("top", "each"))
    one, other = (figures["each_level_alone"]["2"]["harmful_flip_rate"] for figures in (top, each))
    assert one < other  # only one side of a trial is coarse


@pytest.mark.parametrize("enrolment", ["each", "top"])
def test_calibration_tells_the_costs_that_its_cascade_has(run, tmp_path, enrolment):
    given = {"reference": "dev32.npz", "trials": "dev.txt"}
    run(calibrate, *stages("dev"), out="p.json", enrolment=enrolment, replicates=0, **given)
    run(cascade, *stages("dev"), policy="p.json", json="c.json", replicates=0, **given)
    notes, figures = read_policy(tmp_path / "p.json").notes, json.loads((tmp_path / "c.json").read_text())
    for told in (notes["here"], notes["front"][notes["chosen"]]):
        for name in ("sequential_bits", "utterance_bits", "utterance_incremental_bits"):
            assert told[name] == pytest.approx(figures[name]), name


@pytest.mark.parametrize("kind", ["affine", "logistic"])
@pytest.mark.parametrize("point", ["far=0.02", "frr=0.02", "dcf=0.05"])
def test_maps_and_operating_points(run, tmp_path, kind, point):
    flags = {"map": kind, "operating_point": point, "symmetric": None}
    words = [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items()]
    run(calibrate, *stages("dev", (2, 4)), *words, reference="dev32.npz", trials="dev.txt", out="p.json")
    policy = read_policy(tmp_path / "p.json")
    reference = policy.notes["reference"]
    if not point.startswith("dcf"):
        assert 0 < reference[point[:3]] <= 0.02
    (low, high) = policy.gates[0]
    assert high - policy.threshold == pytest.approx(policy.threshold - low, abs=1e-6)
    words = ["--llr", "--out=d.csv", "--json=c.json", "--replicates=0"]
    run(cascade, *stages("new", (2, 4)), *words, policy="p.json", trials="new.txt")
    figures = json.loads((tmp_path / "c.json").read_text())
    assert (figures["harmful_flip_rate"], figures["reference_eer"], figures["eer_ci95"]) == (None, None, None)
    assert figures["cllr"] < 0.5
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    llr = np.array([float(r["llr"]) for r in rows])
    score = np.array([float(r["score"]) for r in rows])
    assert np.corrcoef(llr, score)[0, 1] > 0.95


def test_lists_of_one_class(run, tmp_path, monkeypatch):
    ids = sorted(arrays_of(tmp_path / "dev2.npz")["ids"])
    write_trials(tmp_path / "one.txt", ids, keep=False)
    given = {"reference": "dev32.npz", "trials": "one.txt", "out": "p.json"}
    with pytest.raises(UserError, match=r"one\.txt: no target trials"):
        run(calibrate, *stages("dev"), **given)
    assert not (tmp_path / "p.json").exists()
    run(calibrate, *stages("dev"), operating_point="far=0.01", **given)  # that needs nontargets only
    assert read_policy(tmp_path / "p.json").llr_maps is None
    run(cascade, *stages("dev"), reference="dev32.npz", policy="p.json", trials="one.txt", json="c.json", out="d.csv")
    figures = json.loads((tmp_path / "c.json").read_text())
    assert (figures["eer"], figures["false_reject_rate"]) == (None, None)
    assert figures["false_accept_rate"] < 0.03
    # Told before any work: nothing is scored, and no recording is looked for.
    monkeypatch.setattr(evaluate, "score_levels", None)
    monkeypatch.setattr(evaluate, "load_cascade", lambda *_: SimpleNamespace(policy=read_policy("p.json")))
    for words in ([*stages("dev"), "--policy=p.json"], ["--cascade=made", "--data=nowhere"]):
        with pytest.raises(UserError, match="no likelihood ratios"):
            run(cascade, *words, "--llr", trials="one.txt", out="d.csv")


def test_refusals(run, tmp_path):
    fit = {"reference": "dev32.npz", "trials": "dev.txt", "out": "p.json"}
    run(calibrate, *stages("dev"), **fit)
    for given in ({"bound": "conformal"}, {"certify_share": 0.25}, {"rule": "risk", "objective": "eer"}):
        with pytest.raises(UserError, match=rf"`{list(given)[-1]}` does not go with `rule`"):
            run(calibrate, *stages("dev"), **fit, **given)
    with pytest.raises(UserError, match=r"`delta` does not go with `objective` \(eer\), which has no margin"):
        run(calibrate, *stages("dev"), **fit, objective="eer", delta=0.2)
    use = {"policy": "p.json", "trials": "new.txt"}
    for given in ({"data": "nowhere"}, {"compute": "bfloat16"}, {"engine": "jax"}):
        with pytest.raises(UserError, match=rf"`{list(given)[-1]}` goes with `cascade`, which is not given"):
            run(cascade, *stages("new"), **use, **given)
    with pytest.raises(UserError, match="`llr` adds a column to `out`, which is not given"):
        run(cascade, *stages("new"), "--llr", **use)
    with pytest.raises(UserError, match="`replicates` does not go with `stream`, which has no intervals"):
        run(cascade, *stages("new"), "--stream", "--replicates=50", **use)
    with pytest.raises(UserError, match="is for 2, 3, 4 bits, but 2, 4 are given"):
        run(cascade, *stages("new", (2, 4)), **use)
    write_tables(tmp_path, "alien", 1, model=np.array("someone else's"))
    with pytest.raises(UserError, match=r"alien2\.npz is of the model someone else's, but the policy was made for"):
        run(cascade, *stages("alien"), policy="p.json", trials=_renamed(tmp_path))
    (tmp_path / "other.txt").write_text("1 new00-0 new00-1\n0 new00-0 nobody\n")
    with pytest.raises(UserError, match="other.txt:2: unknown utterance nobody"):
        run(cascade, *stages("new"), policy="p.json", trials="other.txt")
    with pytest.raises(UserError, match="BITS:EMBEDDINGS"):
        run(calibrate, "--stage=two:dev2.npz", **fit)
    with pytest.raises(UserError, match=r"--stage \(=2\): 2 bits are given twice"):
        run(calibrate, "--stage=2:dev2.npz", "--stage=2:dev3.npz", **fit)
    for words, message in (
        ("--alpha=0", r"--alpha \(=0\) must be above 0"),
        ("--delta=1", r"--delta \(=1\) must be below 1"),
        ("--operating_point=far", "`operating_point`: operating point 'far'"),
        ("--plot=p.bmp", r"--plot \(=p.bmp\) must end in"),
        ("--replicates=-1", r"--replicates \(=-1\) must be 0 or at least 20"),
    ):
        with pytest.raises(UserError, match=message):
            run(calibrate, *stages("dev"), words, **fit)
    few = arrays_of(tmp_path / "dev3.npz")
    np.savez(tmp_path / "few.npz", ids=few["ids"][:5], embeddings=few["embeddings"][:5])
    with pytest.raises(UserError, match=r"few\.npz: no embedding of dev"):
        run(calibrate, "--stage=2:dev2.npz", "--stage=3:few.npz", **fit)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UserError, match=r"p\.json: it is no cascade policy"):
        run(cascade, *stages("new"), **use)


def _renamed(directory):
    path = directory / "alien.txt"
    path.write_text((directory / "new.txt").read_text().replace("new", "alien"))
    return path


def test_gates_by_the_cost_of_utterances(run, tmp_path):
    """They cost an utterance no more than gates chosen by trials, at the same limit on flips; and both say the cost."""
    given = {"reference": "dev32.npz", "trials": "dev.txt", "out": "p.json", "alpha": 0.01}
    here = {}
    for cost in ("sequential", "utterance"):
        told = run(calibrate, *stages("dev"), cost=cost, **given)
        here[cost] = read_policy(tmp_path / "p.json").notes["here"]
        front = read_policy(tmp_path / "p.json").notes["front"]
        bits = [row[f"{cost}_bits"] for row in front]
        assert bits == sorted(bits) and "incremental" not in told.out
    assert here["utterance"]["utterance_bits"] <= here["sequential"]["utterance_bits"]
    assert here["utterance"]["harmful_flip_rate"] <= 0.01


def test_gates_by_seconds(run, tmp_path):
    """Levels that are different networks: a policy's costs, its front and what it saves are told in seconds."""
    given = {"reference": "dev32.npz", "trials": "dev.txt", "out": "p.json", "alpha": 0.01}
    for cost in ("sequential", "utterance"):
        told = run(calibrate, *stages("dev", (2, 32)), cost=cost, seconds="0.001,0.5", **given)
        policy = read_policy(tmp_path / "p.json")
        here, front = policy.notes["here"], policy.notes["front"]
        assert policy.seconds == (0.001, 0.5) and "at the last level 500.0 ms" in told.out
        assert here["sequential_seconds"] == pytest.approx(0.001 + 0.5 * here["resolved"]["32"], rel=1e-5)
        costs = [row[f"{cost}_seconds"] for row in front]
        assert costs == sorted(costs) and here["harmful_flip_rate"] <= 0.01
    run(cascade, *stages("new", (2, 32)), policy="p.json", trials="new.txt", json="c.json", replicates=0)
    figures = json.loads((tmp_path / "c.json").read_text())
    assert figures["seconds_a_recording"] == {"2": 0.001, "32": 0.5}
    assert figures["saved"]["trial"] == pytest.approx(1 - figures["sequential_seconds"] / 0.5)
    for words, message in (
        (("--seconds=1",), r"`seconds` \(=1\) must be one number for each of 2 levels"),
        (("--seconds=0,1",), r"--seconds \(=0,1\) must be above 0"),
        (("--seconds=1,2", "--nested"), "--seconds.* not with nested codebooks"),
    ):
        with pytest.raises(UserError, match=message):
            run(calibrate, *stages("dev", (2, 32)), *words, **given)


def test_new_bits_count_only_where_codebooks_nest(run, tmp_path):
    told = {}
    for words in ((), ("--nested",)):
        run(calibrate, *stages("dev"), *words, reference="dev32.npz", trials="dev.txt", out="p.json")
        given = {"policy": "p.json", "trials": "new.txt", "json": "c.json", "replicates": 0}
        told[words] = run(cascade, *stages("new"), **given).out
        figures = json.loads((tmp_path / "c.json").read_text())
        assert figures["nested"] == bool(words)
        kind = "incremental" if words else "sequential"
        assert figures["saved"]["trial"] == pytest.approx(1 - figures[f"{kind}_bits"] / 4)
        gains_nothing = figures["saved"]["utterance"] <= 0
        assert gains_nothing == ("by utterance this cascade gains nothing" in told[words])
    assert "incremental" in told["--nested",] and "incremental" not in told[()]
    assert "by utterance this cascade gains nothing" in told[()]  # here nearly every utterance is in a doubtful trial
