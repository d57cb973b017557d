"""A cascade in parts decides and counts as at once; shares add up; processes share a list; counts beyond 32 bits."""

import json
import math
from pathlib import Path

import commands
import numpy as np
import pytest

from kmq_jax.cascade import evaluate, stream
from kmq_jax.cascade import run as runs
from kmq_jax.cascade.options import CascadeOptions
from kmq_jax.cascade.policy import CascadePolicy, fit_map, read_policy, symmetric_gates
from kmq_jax.core.errors import UserError
from kmq_jax.data import trials as lists
from kmq_jax.metrics.calibration import AffineMap
from kmq_jax.scoring.stream import score_stream

OPTIONS = CascadeOptions(replicates=0, stream=True)
SPEAKERS, EACH = 12, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Embeddings of three levels and a reference, trials of utterances and of models, and policies."""
    place, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    owner = np.repeat(np.arange(SPEAKERS), EACH)
    rows = rng.standard_normal((SPEAKERS, 16))[owner] + 0.8 * rng.standard_normal((len(owner), 16))
    ids = np.array([f"s{s}-{i % EACH}" for i, s in enumerate(owner)])
    speakers = np.array([f"s{s}" for s in owner])
    tables = {bits: rows + noise * rng.standard_normal(rows.shape) for bits, noise in ((2, 0.4), (3, 0.2), (4, 0.1))}
    for number, (bits, table) in enumerate({**tables, 32: rows}.items()):
        order = np.roll(np.arange(len(ids)), number)  # files need not agree in their order
        values = {"ids": ids, "speakers": speakers, "embeddings": table.astype(np.float32)}
        np.savez(place / f"e{bits}.npz", **{name: value[order] for name, value in values.items()})
    one, two = np.triu_indices(len(ids), 1)
    labels = owner[one] == owner[two]
    lines = (f"{int(y)} {ids[a]} {ids[b]}\n" for a, b, y in zip(one, two, labels))
    (place / "trials.txt").write_text("".join(lines))
    (place / "models.txt").write_text("".join(f"m{s} s{s}-0 s{s}-1\n" for s in range(SPEAKERS)))
    tested = [name for name in ids if not name.endswith(("-0", "-1"))]
    enrolled = (f"m{s} {t} {int(t.startswith(f's{s}-'))}\n" for s in range(SPEAKERS) for t in tested)
    (place / "enrolled.txt").write_text("".join(enrolled))

    unit = {bits: table / np.linalg.norm(table, axis=1, keepdims=True) for bits, table in {**tables, 32: rows}.items()}
    scores = {bits: np.sum(table[one] * table[two], axis=1) for bits, table in unit.items()}
    maps = {
        kind: tuple(fit_map(kind, scores[bits], scores[32], labels) for bits in tables)
        for kind in ("isotonic", "affine")
    }
    gates, llrs = symmetric_gates(0.4, [0.15, 0.05]), (AffineMap(9.0, -4.0),) * 3
    CascadePolicy((2, 3, 4), maps["isotonic"], gates, 0.4, llrs).save(place / "each.json")
    CascadePolicy((2, 3, 4), maps["affine"], gates, 0.4, enrolment="top").save(place / "top.json")
    return place


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(lists, "_CHUNK", 7000)
    monkeypatch.setattr(runs, "_CHUNK", 256)


def levels(files):
    return [(bits, str(files / f"e{bits}.npz")) for bits in (2, 3, 4)]


def given(files, form):
    """Policy, trials and the list of models of a form: "each", "top", or "models"."""
    policy = files / ("top.json" if form == "top" else "each.json")
    if form == "models":
        return policy, str(files / "enrolled.txt"), str(files / "models.txt")
    return policy, str(files / "trials.txt"), None


@pytest.mark.parametrize("form", ["each", "top", "models"])
def test_the_same_decisions_and_figures_as_at_once(files, tmp_path, form):
    policy, trials, models = given(files, form)
    reference = str(files / "e32.npz")
    whole = evaluate.evaluate_embeddings(policy, levels(files), trials, OPTIONS, reference, models)
    llr = form != "top"
    llrs = evaluate.log_ratios(whole.policy, whole.outcome) if llr else None
    evaluate.write_decisions(tmp_path / "whole.csv", whole.joined.trials, whole.outcome, llrs)
    about = {"reference": reference, "enrol_models": models, "out": tmp_path / "parts.csv", "llr": llr}
    found = stream.cascade_stream(policy, levels(files), trials, OPTIONS, **about)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()

    expected = dict(whole.figures)
    for name in ("eer", "min_dcf", "reference_eer", "reference_min_dcf"):
        low, high = found.pop(f"{name}_bounds")
        assert low - 1e-9 <= expected.pop(name) <= high + 1e-9
        assert low - 1e-9 <= found.pop(name) <= high + 1e-9
    for bits, alone in expected.pop("each_level_alone").items():
        ours = found["each_level_alone"][bits]
        low, high = ours.pop("eer_bounds")
        assert low - 1e-9 <= alone.pop("eer") <= high + 1e-9 and high - low < 2
        assert low - 1e-9 <= ours.pop("eer") <= high + 1e-9
        assert ours == pytest.approx(alone, rel=1e-12)
    del found["each_level_alone"]
    bands, theirs = found.pop("remaining_flips"), expected.pop("remaining_flips")
    assert found == {
        name: pytest.approx(value, rel=1e-9) if isinstance(value, (float, dict)) else value
        for name, value in expected.items()
    }
    # Bands end at the edge of a bin: a trial or two later than the shares that are asked for.
    wide = [band["nearest"][1] for band in theirs]
    assert [band["nearest"][1] for band in bands] == pytest.approx(wide, abs=200 / expected["trials"])
    everywhere = sum(rate for band in bands for rate in band["harmful_flip_rate"].values())
    assert everywhere == pytest.approx(found["harmful_flip_rate"])


def test_without_a_reference_and_with_one_class(files, tmp_path, capsys):
    policy, trials, _ = given(files, "each")
    lines = [line for line in Path(trials).read_text().splitlines(keepends=True) if line.startswith("0")]
    (tmp_path / "one.txt").write_text("".join(lines))
    stages = [f"--stage={bits}:{path}" for bits, path in levels(files)]
    from kmq_jax.cli import cascade  # as a command, in this process

    with pytest.MonkeyPatch.context() as patch:
        flags = [f"--policy={policy}", *stages, f"--trials={tmp_path / 'one.txt'}", f"--json={tmp_path / 'c.json'}"]
        patch.setattr("sys.argv", ["cascade", "--stream", *flags])
        cascade.main()
        patch.setattr("sys.argv", ["cascade", "--stream", "--cascade=x", f"--trials={trials}"])
        with pytest.raises(UserError, match="--cascade cannot be used with --stream"):
            cascade.main()
    figures = json.loads((tmp_path / "c.json").read_text())
    assert (figures["eer"], figures["eer_bounds"], figures["false_reject_rate"]) == (None, None, None)
    assert (figures["reference_eer"], figures["harmful_flip_rate"], figures["remaining_flips"]) == (None, None, None)
    assert figures["trials"] == len(lines) and 0 <= figures["false_accept_rate"] < 1
    assert f"{len(lines):,} trials" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3])
def test_shares_add_up_to_the_list(files, count, monkeypatch):
    """Each share alone; then what each counted, added as processes do, tells the figures of one process."""
    policy, trials, _ = given(files, "each")
    tallies, calls = [], []
    monkeypatch.setattr(stream.Tally, "gather", lambda self: tallies.append(self))
    for share in [(0, 1), *((i, count) for i in range(count))]:
        about = {"reference": str(files / "e32.npz"), "share": share}
        stream.cascade_stream(policy, levels(files), trials, OPTIONS, **about)
    whole, *shares = tallies
    assert min(part.trials for part in shares) > 0
    monkeypatch.undo()

    def told(values):
        calls[-1].append(values)
        return values

    monkeypatch.setattr(stream.distributed, "sum_of_all", told)
    monkeypatch.setattr(stream.distributed, "highest_of_all", told)
    for part in shares:  # what each process tells the others, in the same order
        calls.append([])
        part.gather()
    monkeypatch.setattr(stream.distributed, "sum_of_all", lambda values: np.sum(next(turns), axis=0))
    monkeypatch.setattr(stream.distributed, "highest_of_all", lambda values: np.max(next(turns), axis=0))
    turns = zip(*calls)
    shares[0].gather()
    one, found = whole.figures(0.01), shares[0].figures(0.01)
    assert found.pop("cllr") == pytest.approx(one.pop("cllr"), rel=1e-12)
    assert found == one


def test_two_processes_of_two_devices_give_what_one_gives(files, tmp_path):
    policy, trials, _ = given(files, "each")
    about = {"reference": str(files / "e32.npz"), "out": tmp_path / "one.csv"}
    one = stream.cascade_stream(policy, levels(files), trials, OPTIONS, **about)
    flags = [f"--policy={policy}", *(f"--stage={bits}:{path}" for bits, path in levels(files))]
    flags += [f"--reference={files / 'e32.npz'}", f"--trials={trials}"]
    flags += [f"--json={tmp_path / 'm.json'}", f"--out={tmp_path / 'd.csv'}"]
    status, said = commands.pair("cascade", "--stream", *flags)
    assert status == [0, 0], said
    found = json.loads((tmp_path / "m.json").read_text())
    assert found.pop("cllr") == pytest.approx(one.pop("cllr"), rel=1e-12)  # a sum of floats, in another order
    assert found == json.loads(json.dumps(one))
    halves = [(tmp_path / f"d-{i}-of-2.csv").read_text().splitlines() for i in range(2)]
    assert min(map(len, halves)) > 1
    assert halves[0] + halves[1][1:] == (tmp_path / "one.csv").read_text().splitlines()


def test_counts_of_billions_of_trials(files):
    """A tally as it stands after 4 * 10^9 trials: every figure is that of the counts, which 32 bits cannot hold."""
    tally = stream.Tally(read_policy(files / "each.json"), (10, 0), reference=True)
    billion = 10**9
    tally.decided[:] = 2 * billion, billion, billion
    tally.accepted[:] = [[3 * billion - 3, 3], [1, billion - 1]]
    tally.flips[:] = 0
    tally.flips[-1] = billion + 1, 1
    tally.near[0, 0], tally.near[-1, 0], tally.near[-1, 9] = billion + 1, 3 * billion, billion
    tally._reached[:] = 2
    for counts in (*tally.histograms, tally.of_reference):
        # A quarter of either class beyond the other's middle: nontargets above, targets below.
        counts.counts[0, [10, 30]] = 2250 * 10**6, 750 * 10**6
        counts.counts[1, [5, 40]] = 250 * 10**6, 750 * 10**6
    tally.gather()
    found = tally.figures(0.01)
    assert (found["trials"], found["targets"]) == (4 * billion, billion)
    assert (found["false_accept_rate"], found["false_reject_rate"]) == (3 / (3 * billion), 1 / billion)
    assert found["resolved"] == {"2": 0.5, "3": 0.25, "4": 0.25}
    assert found["sequential_bits"] == 2 * 0.5 + 5 * 0.25 + 9 * 0.25
    assert (found["harmful_flip_rate"], found["beneficial_flip_rate"]) == (
        (billion + 1) / (4 * billion),
        1 / (4 * billion),
    )
    assert found["eer"] == found["reference_eer"] == pytest.approx(25.0)
    assert found["remaining_flips"][0]["nearest"] == [0, 75.0]
    assert math.isclose(found["remaining_flips"][0]["harmful_flip_rate"]["2"], (billion + 1) / (4 * billion))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": "synthetic:dev"}, "`stream` reads a list from a file"),
        ({"levels": [2, 4]}, "is for 2, 3, 4 bits, but 2, 4 are given"),
        ({"llr": True, "policy": "top.json"}, "has no likelihood ratios"),
        ({"lacks": "s1-2"}, r"few\.npz: no embedding of s1-2"),
        ({"line": "1 s1-0 nobody"}, r"t\.txt:1001: unknown utterance nobody"),
    ],
)
def test_mistakes_leave_no_file(files, tmp_path, change, message):
    policy, trials, _ = given(files, "each")
    policy = files / change.get("policy", policy)
    chosen = [level for level in levels(files) if level[0] in change.get("levels", (2, 3, 4))]
    if "lacks" in change:
        table = commands.arrays_of(chosen[1][1])
        kept = table["ids"] != change["lacks"]
        np.savez(tmp_path / "few.npz", ids=table["ids"][kept], embeddings=table["embeddings"][kept])
        chosen[1] = 3, str(tmp_path / "few.npz")
    if "line" in change:
        lines = Path(trials).read_text().splitlines()
        lines[1000] = change["line"]
        trials = str(tmp_path / "t.txt")
        (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "d.csv"
    with pytest.raises(UserError, match=message):
        stream.cascade_stream(
            policy, chosen, change.get("trials", trials), OPTIONS, out=out, llr=change.get("llr", False)
        )
    assert not out.exists()


def test_a_histogram_of_scores_alone_is_that_of_score(files):
    """A cascade of one level and a straight line is `score --stream` of its file."""
    line = CascadePolicy((2,), (AffineMap(1.0, 0.0),), (), 0.4)
    assert stream.span(line) == (-1.0, 1.0)
    from kmq_jax.scoring.options import ScoringOptions

    trials = str(files / "trials.txt")
    scored = score_stream(files / "e2.npz", trials, ScoringOptions(replicates=0, stream=True))
    line.save(files / "line.json")
    found = stream.cascade_stream(files / "line.json", levels(files)[:1], trials, OPTIONS)
    assert (found["eer"], found["eer_bounds"]) == (scored["eer"], scored["eer_bounds"])
