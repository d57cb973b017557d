"""`python -m kmq_jax.score` on hand-made embeddings, on mistakes, and on a real model's embeddings."""

import json
import os
import subprocess
import sys

import commands
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from kmq_jax.cli import score
from kmq_jax.core.errors import UserError
from kmq_jax.data.source import open_source
from kmq_jax.data.synthetic import open_synthetic
from kmq_jax.metrics import calibration, detection

SPEAKERS, EACH, DIM = 12, 6, 16


def write_table(path, seed=0, people=SPEAKERS, prefix="s", noise=0.9, **changes):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(people), EACH)
    centre = np.random.default_rng(17).standard_normal((people, DIM))
    rows = centre[owner] + noise * rng.standard_normal((len(owner), DIM))
    ids = [f"{prefix}{s:02d}-{i % EACH}" for i, s in enumerate(owner)]
    arrays = {
        "ids": np.array(ids),
        "paths": np.array([f"{prefix}{s:02d}/{name}.wav" for s, name in zip(owner, ids)]),
        "speakers": np.array([f"{prefix}{s:02d}" for s in owner]),
        "embeddings": rows.astype(np.float32),
    } | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


def write_trials(path, names, form="voxceleb", share=0.5):
    """A random share of all pairs; returns both rows and the labels."""
    rng = np.random.default_rng(1)
    one, two = np.triu_indices(len(names), 1)
    chosen = rng.permutation(len(one))[: int(len(one) * share)]
    one, two = one[chosen], two[chosen]
    labels = one // EACH == two // EACH
    lines = (
        f"{int(y)} {names[a]} {names[b]}" if form == "voxceleb" else f"{names[a]} {names[b]} {'' if y else 'non'}target"
        for a, b, y in zip(one, two, labels)
    )
    path.write_text("\n".join(lines) + "\n")
    return one, two, labels


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in this process with flags; returns what it printed."""

    def call(**given):
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        monkeypatch.setattr(sys, "argv", ["score", *words])
        score.main()
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return call


def test_what_changes_against_another_model(run, tmp_path):
    names = write_table(tmp_path / "full.npz", noise=0.4)["ids"].tolist()
    write_table(tmp_path / "few.npz", noise=0.4)
    write_table(tmp_path / "bad.npz", noise=6.0)
    write_trials(tmp_path / "trials", names, "kaldi")
    alone = [
        run(embeddings=f"{name}.npz", trials="trials", json="m.json") and read(tmp_path / "m.json")
        for name in ("full", "bad")
    ]
    same = run(embeddings="few.npz", reference="full.npz", trials="trials", json="same.json").out
    assert "EER, points +0.000   [+0.000, +0.000]   not told apart" in same
    worse = run(embeddings="bad.npz", reference="full.npz", trials="trials", json="worse.json").out
    found = read(tmp_path / "worse.json")
    assert found["eer_change"] == pytest.approx(alone[1]["eer"] - alone[0]["eer"]) and found["eer_change_ci95"][0] > 5
    assert (
        f"EER, points {found['eer_change']:+.3f}" in worse and "beyond chance" in worse.partition("against full.npz")[2]
    )
    told = run(embeddings="bad.npz", reference="full.npz", trials="trials", replicates=0).out
    assert told.endswith(f"minDCF      {found['min_dcf_change']:+.4f}\n") and "too few" not in told
    assert found["reference"] == "full.npz" and "reference" not in alone[0]
    for other in ("enrol_embeddings", "snorm_cohort"):
        with pytest.raises(UserError, match="`reference` is compared by cosine"):
            run(embeddings="bad.npz", reference="full.npz", trials="trials", **{other: "few.npz"})


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("form", ["voxceleb", "kaldi"])
def test_scores_and_figures(run, tmp_path, form):
    arrays = write_table(tmp_path / "e.npz")
    names = arrays["paths" if form == "voxceleb" else "ids"].tolist()
    one, two, labels = write_trials(tmp_path / "trials", names, form)
    printed = run(embeddings="e.npz", trials="trials", out="scores.txt", json="metrics.json").out

    lines = [line.split() for line in (tmp_path / "scores.txt").read_text().splitlines()]
    assert [(a, b) for a, b, _ in lines] == [(names[a], names[b]) for a, b in zip(one, two)]
    scores = np.array([float(value) for _, _, value in lines])
    np.testing.assert_allclose(scores, cosine_similarity(arrays["embeddings"])[one, two], atol=1e-6)

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rate, threshold = detection.eer(scores, labels)  # of the scores as written: nothing is lost in the file
    assert (metrics["eer"], metrics["threshold"]) == (100 * rate, pytest.approx(threshold, abs=1e-9))
    assert metrics["min_dcf"] == detection.min_dcf(scores, labels)
    assert metrics["min_cllr"] == pytest.approx(calibration.min_cllr(scores, labels))
    assert metrics["min_cllr"] < metrics["cllr"] < 1
    assert (metrics["trials"], metrics["targets"], metrics["speakers"]) == (len(labels), labels.sum(), SPEAKERS)
    for name in ("eer", "min_dcf"):
        low, high = metrics[f"{name}_ci95"]
        assert 0 <= low <= metrics[name] <= high
    assert f"{metrics['eer']:.3f}" in printed
    assert "other speakers" in printed


def test_enrolment_embeddings_may_be_another_models(run, tmp_path):
    """The test-only drift of a quantized model: the same utterances in both files, one side from each."""
    tests, enrols = write_table(tmp_path / "e.npz"), write_table(tmp_path / "f.npz", seed=5)
    one, two, _ = write_trials(tmp_path / "trials", tests["ids"].tolist(), "kaldi")
    run(embeddings="e.npz", enrol_embeddings="f.npz", trials="trials", out="s", replicates=0)
    scores = np.loadtxt(tmp_path / "s", usecols=2)
    expected = cosine_similarity(enrols["embeddings"], tests["embeddings"])
    np.testing.assert_allclose(scores, expected[one, two], atol=1e-6)


def test_tables_of_different_utterances(run, tmp_path):
    tests = write_table(tmp_path / "e.npz")
    enrols = write_table(tmp_path / "f.npz", prefix="t", people=3)
    (tmp_path / "trials").write_text("t00-0 s01-0 nontarget\nt02-3 s00-1 target\n")
    run(embeddings="e.npz", enrol_embeddings="f.npz", trials="trials", out="s", json="m.json")
    expected = cosine_similarity(enrols["embeddings"], tests["embeddings"])
    np.testing.assert_allclose(np.loadtxt(tmp_path / "s", usecols=2), [expected[0, 6], expected[15, 1]], atol=1e-6)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["cllr"] is None
    assert metrics["eer_ci95"] is None
    (tmp_path / "trials").write_text("t00-0 s01-0 nontarget\ns02-3 s00-1 target\n")
    with pytest.raises(UserError, match=r"trials: the enrolment utterance s02-3 is not in f\.npz"):
        run(embeddings="e.npz", enrol_embeddings="f.npz", trials="trials")
    (tmp_path / "trials").write_text("t00-0 t01-0 nontarget\n")
    with pytest.raises(UserError, match=r"trials: the test utterance t01-0 is not in e\.npz"):
        run(embeddings="e.npz", enrol_embeddings="f.npz", trials="trials")


def test_enrolment_models_of_several_utterances(run, tmp_path):
    arrays = write_table(tmp_path / "e.npz")
    (tmp_path / "models").write_text("alice s00-0 s00-1 s00-2\nbob s01-0\n")
    (tmp_path / "trials").write_text("alice s00-5 target\nbob s00-5 nontarget\nalice s01-3 nontarget\n")
    run(embeddings="e.npz", trials="trials", enrol_models="models", out="s")
    unit = arrays["embeddings"] / np.linalg.norm(arrays["embeddings"], axis=1, keepdims=True)
    models = np.stack([unit[:3].mean(axis=0), unit[6]])
    expected = cosine_similarity(models, unit)
    np.testing.assert_allclose(
        np.loadtxt(tmp_path / "s", usecols=2), [expected[0, 5], expected[1, 5], expected[0, 9]], atol=1e-6
    )
    assert (tmp_path / "s").read_text().startswith("alice s00-5 ")
    write_table(tmp_path / "few.npz", people=1)
    with pytest.raises(UserError, match=r"models: the enrolment utterance s01-0 is not in few\.npz"):
        run(embeddings="e.npz", enrol_embeddings="few.npz", trials="trials", enrol_models="models")
    with pytest.raises(UserError, match="unknown enrolment model alice"):
        (tmp_path / "models").write_text("bob s01-0\n")
        run(embeddings="e.npz", trials="trials", enrol_models="models")


def test_speakers_are_told_apart_by_the_list_where_the_file_does_not_name_them(run, tmp_path):
    names = write_table(tmp_path / "e.npz")["ids"].tolist()
    write_table(tmp_path / "bare.npz", paths=None)
    write_table(tmp_path / "nameless.npz", speakers=None)
    write_trials(tmp_path / "trials", names, "kaldi", share=1)
    found = {}
    for name in ("e", "bare", "nameless"):
        run(embeddings=f"{name}.npz", trials="trials", json="m.json")
        found[name] = json.loads((tmp_path / "m.json").read_text())
    assert found["e"] == found["bare"]
    assert found["nameless"]["speakers_source"] == "told apart by the target trials"
    assert found["nameless"]["speakers"] == SPEAKERS
    assert found["nameless"]["eer"] == found["e"]["eer"]


def test_snorm(run, tmp_path):
    names = write_table(tmp_path / "e.npz")["ids"].tolist()
    write_table(tmp_path / "c.npz", prefix="c", people=30, seed=9)
    write_trials(tmp_path / "trials", names, "kaldi")
    run(embeddings="e.npz", trials="trials", snorm_cohort="c.npz", top_n=20, json="m.json", out="s")
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["snorm"] == {"cohort": "c.npz", "members": 180, "top_n": 20, "shared_speakers": 0}
    assert np.loadtxt(tmp_path / "s", usecols=2).std() > 1
    run(embeddings="e.npz", trials="trials", snorm_cohort="c.npz", cohort_speaker_means=True, json="m.json")
    assert json.loads((tmp_path / "m.json").read_text())["snorm"]["members"] == 30
    assert (
        "12 speakers of the trials are also in the cohort"
        in run(embeddings="e.npz", trials="trials", snorm_cohort="e.npz").err
    )
    with pytest.raises(UserError, match=r"`top_n` \(=181\) must lie between 2 and the cohort's size, 180"):
        run(embeddings="e.npz", trials="trials", snorm_cohort="c.npz", top_n=181)
    with pytest.raises(UserError, match="`top_n` and `cohort_speaker_means` need a cohort"):
        run(embeddings="e.npz", trials="trials", top_n=20)


def test_calibration_travels(run, tmp_path):
    names = write_table(tmp_path / "e.npz")["ids"].tolist()
    write_table(tmp_path / "c.npz", prefix="c", people=30, seed=9)
    write_trials(tmp_path / "trials", names, "kaldi")
    run(embeddings="e.npz", trials="trials", save_calibration="cal.json", json="cross.json")
    run(embeddings="e.npz", trials="trials", calibration="cal.json", json="given.json")
    cross, given = (json.loads((tmp_path / name).read_text()) for name in ("cross.json", "given.json"))
    assert given["calibration"] == "given by cal.json"
    assert given["min_cllr"] == cross["min_cllr"] <= given["cllr"] < cross["cllr"]
    with pytest.raises(UserError, match="is for cosine scores, but these are snorm scores"):
        run(embeddings="e.npz", trials="trials", calibration="cal.json", snorm_cohort="c.npz")
    (tmp_path / "cal.json").write_text('{"kind": "affine", "scale": -1.5, "offset": 0}')
    with pytest.raises(UserError, match="--calibration=cal.json: a map of scale -1.5 falls"):
        run(embeddings="e.npz", trials="trials", calibration="cal.json")
    (tmp_path / "cal.json").write_text('{"kind": "magic"}')
    with pytest.raises(UserError, match="--calibration=cal.json: a calibration of kind 'magic' is not known"):
        run(embeddings="e.npz", trials="trials", calibration="cal.json")


def test_scores_are_utf8_whatever_the_locale(tmp_path):
    code = """
import numpy as np
from kmq_jax.data.table import Trials
from kmq_jax.scoring.run import write_scores
row = np.zeros(1, np.int32)
write_scores("scores.txt", Trials(row, row, row > 0, ("caf\\u00e9",), row, row), np.ones(1))
"""
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, check=True)
    assert (tmp_path / "scores.txt").read_text(encoding="utf-8") == "caf\u00e9 caf\u00e9 1\n"


def test_det_plot(run, tmp_path):
    names = write_table(tmp_path / "e.npz")["ids"].tolist()
    write_trials(tmp_path / "trials", names, "kaldi")
    run(embeddings="e.npz", trials="trials", det="det.png")
    assert (tmp_path / "det.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--det \(=det.doc\) must end in"):
        run(embeddings="e.npz", trials="trials", det="det.doc")


def test_synthetic_trials(run, tmp_path):
    spec = "synthetic:dev?speakers=6&utterances=4"
    utterances = open_synthetic(spec)
    rows = np.random.default_rng(0).standard_normal((len(utterances), 8)) + 4 * np.eye(6, 8)[utterances.labels]
    order = np.random.default_rng(1).permutation(len(utterances))  # rows are found by name, not by place
    ids, speakers = np.array(utterances.ids), np.array(utterances.speakers)
    np.savez(tmp_path / "e.npz", ids=ids[order], speakers=speakers[order], embeddings=rows[order])
    run(embeddings="e.npz", trials=spec, json="m.json")
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["targets"] == 36
    assert metrics["eer"] < 10
    np.savez(tmp_path / "e.npz", ids=ids[:-1], embeddings=rows[:-1])
    with pytest.raises(UserError, match=f"the utterance {ids[-1]} has no embedding"):
        run(embeddings="e.npz", trials=spec)


def test_mistakes_get_one_line_and_leave_nothing(run, tmp_path):
    names = write_table(tmp_path / "e.npz")["ids"].tolist()
    write_trials(tmp_path / "trials", names, "kaldi")
    (tmp_path / "unknown").write_text("s00-0 s00-1 target\ns00-0 nobody nontarget\n")
    (tmp_path / "one_class").write_text("s00-0 s00-1 target\n")
    write_table(tmp_path / "nan.npz", embeddings=np.full((72, DIM), np.nan, np.float32))
    for flags, message in [
        ({"embeddings": "none.npz"}, "cannot read none.npz"),
        ({"embeddings": "nan.npz"}, "nan.npz: the embedding of s00-0 is zero or not finite, and 71 more"),
        ({"trials": "unknown"}, "unknown:2: unknown utterance nobody"),
        ({"trials": "one_class"}, "one_class: no nontarget trials among 1 trials"),
        ({"p_target": "1.5"}, r"--p_target \(=1.5\) must be below 1"),
        ({"stream": True, "replicates": 50}, "`replicates` does not go with `stream`, which has no intervals"),
        ({"replicates": "-1"}, r"--replicates \(=-1\) must be 0 or at least 20"),
        ({"out": "trials/below"}, r"--out \(=trials/below\) cannot be written"),
    ]:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError, match=message) as caught:
            run(**{"embeddings": "e.npz", "trials": "trials", "out": "s", "json": "m.json", **flags})
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_command_exits_2_without_a_traceback(tmp_path, monkeypatch, capsys):
    assert commands.run(monkeypatch, "score", f"--embeddings={tmp_path}/no.npz", "--trials=x") == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("kmq-jax score: cannot read") and told.err.count("\n") == 1


@pytest.mark.slow
def test_a_published_model_on_real_speech(run, shared, tmp_path):
    """WeSpeaker's ResNet34 by ONNX Runtime and kaldi-native-fbank; the figures are those of shared/models/README.md."""
    knf, ort = pytest.importorskip("kaldi_native_fbank"), pytest.importorskip("onnxruntime")
    data = shared / "data/words/dev"
    model = shared / "models/wespeaker-voxceleb-resnet34.onnx"
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.window_type, options.mel_opts.num_bins = 0.0, "hamming", 80

    def embed(wave):
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(16000, (wave * 32768).tolist())
        fbank.input_finished()
        features = np.array([fbank.get_frame(i) for i in range(fbank.num_frames_ready)], np.float32)
        return session.run(None, {"feats": (features - features.mean(axis=0))[None]})[0][0]

    utterances = open_source(data)
    rows = np.stack([embed(utterances.load(i)) for i in range(len(utterances))])
    names = {"ids": utterances.ids, "paths": utterances.paths, "speakers": utterances.speakers}
    np.savez(tmp_path / "e.npz", embeddings=rows, **{name: np.array(value) for name, value in names.items()})
    run(embeddings="e.npz", trials=data / "trials.txt", json="paths.json")
    run(embeddings="e.npz", trials=data / "trials.kaldi", json="ids.json")
    metrics = json.loads((tmp_path / "paths.json").read_text())
    assert metrics == json.loads((tmp_path / "ids.json").read_text())
    assert metrics["eer"] == pytest.approx(2.600, abs=0.0006)
    assert metrics["min_dcf"] == pytest.approx(0.3274, abs=0.0006)
    assert (metrics["trials"], metrics["targets"], metrics["speakers"]) == (10_000, 2_000, 11)
