"""The command as a user runs it."""

import json
import resource
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import recordings

from kmq_jax.data.source import open_source


def command(*flags):
    return [sys.executable, "-m", "kmq_jax", "prepare_data", *map(str, flags)]


def run(*flags, **settings):
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_real_speech_with_bad_files_among_it(shared, tmp_path):
    table = open_source(shared / "data/words/dev")
    chosen = range(0, 220, 5)
    lines = [f"{table.location(i)},{table.speakers[i]}\n" for i in chosen]
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "cut.opus").write_bytes(table.location(0).read_bytes()[:5000])
    lines[10:10] = ["empty.wav,x\n", "cut.opus,x\n", "gone.wav,x\n"]
    (tmp_path / "list.csv").write_text("path,speaker\n" + "".join(lines))
    done = run(f"--source={tmp_path / 'list.csv'}", f"--out={tmp_path / 'out'}", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert "44 utterances of 11 speakers" in done.stdout and "3 rejected" in done.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["utterances"], summary["speakers"], summary["rejected"]) == (44, 11, 3)
    assert (
        tmp_path / "out/rejected.csv"
    ).read_text() == "path,reason\nempty.wav,empty\ncut.opus,truncated\ngone.wav,missing\n"
    opened = open_source(tmp_path / "out")
    for i, row in enumerate(chosen):
        assert opened.speakers[i] == table.speakers[row]
        # Opus may overshoot, 16 bits cannot.
        expected = np.clip(table.load(row), -1, 32767 / 32768)
        np.testing.assert_allclose(opened.load(i), expected, atol=0.51 / 32768)


def test_killed_and_started_again_with_other_workers_it_gives_the_same(tmp_path):
    source = recordings.kaldi(tmp_path / "k", speakers=10, each=40, seconds=4)
    assert run(f"--source={source}", f"--out={tmp_path / 'whole' / 'set'}", "--workers=1").returncode == 0
    out = tmp_path / "set"
    running = subprocess.Popen(command(f"--source={source}", f"--out={out}", "--workers=1"), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(out.glob(".prepare/00001.json")) and time.monotonic() < until:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    finished = [path.with_suffix(".array_record").stat().st_mtime_ns for path in sorted(out.glob(".prepare/0*.json"))]
    assert 2 <= len(finished) < 7 and not (out / "dataset_info.json").exists()
    time.sleep(1.0)  # workers follow their parent; one that lived on would disturb the second run
    again = run(f"--source={source}", f"--out={out}", "--workers=2")
    assert again.returncode == 0, again.stderr
    shards = sorted(out.glob("*array_record*"))
    assert [path.stat().st_mtime_ns for path in shards[: len(finished)]] == finished
    assert contents(out) == contents(tmp_path / "whole" / "set")


def test_mistakes_take_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "wav.scp").write_text("u1 a.wav\nu2 sox b.wav - |\n")
    (tmp_path / "utt2spk").write_text("u1 s\nu2 s\n")
    for flags, message in [
        ([f"--source={tmp_path}", f"--out={tmp_path / 'out'}"], "wav.scp:2: u2 is a command"),
        ([f"--source={tmp_path / 'no'}", f"--out={tmp_path / 'out'}"], "no such file"),
        ([f"--source={tmp_path}", f"--out={tmp_path / 'out'}", "--workers=0"], "--workers (=0)"),
        ([f"--source={tmp_path}", f"--out={tmp_path / 'out'}", "--beam="], "--beam must name options of Apache Beam"),
        ([f"--source={tmp_path}"], "--out"),
    ]:
        assert commands.run(monkeypatch, "prepare_data", *flags) == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1 and message in told
        assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path):
    source = recordings.kaldi(tmp_path / "k", speakers=2, each=5, seconds=4)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = run(f"--source={source}", f"--out={tmp_path / 'out'}", "--workers=1", preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    done = run(f"--source={source}", f"--out={tmp_path / 'out'}", "--workers=1")  # with room it goes on
    assert done.returncode == 0, done.stderr
    assert len(open_source(tmp_path / "out")) == 10
