"""Public corpora laid out from stand-ins of their archives, served on this machine."""

import dataclasses
import functools
import hashlib
import io
import random
import shutil
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import recordings
from commands import run

from kmq_jax.core import download
from kmq_jax.core.errors import UserError
from kmq_jax.data import layouts
from kmq_jax.data.source import open_source
from kmq_jax.data.trials import open_trials


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def served(tmp_path):
    """A directory, and the address that it is served at."""
    place = tmp_path / "served"
    place.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=place)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield place, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def speechocean(place):
    """The release in miniature: tabs, capital suffixes, paths from the release's own root."""
    root = place / "speechocean762"
    speakers = {"train": ("0024", "0001", "0044", "0003"), "test": ("0093", "0005", "0096")}
    for part, names in speakers.items():
        lists = {"wav.scp": [], "utt2spk": [], "spk2gender": [], "spk2age": []}
        for number, speaker in enumerate(names):
            lists["spk2gender"].append(f"{speaker}\tf\n")
            lists["spk2age"].append(f"{speaker}\t{6 if number < 2 else 30}\n")
            for utterance in range(3):
                name = f"0{speaker}001{utterance}"
                path = f"WAVE/SPEAKER{speaker}/{name}.WAV"
                seconds = 1.0 if speaker == "0096" or utterance == 2 else 2.5  # 0096 has nothing long enough
                recordings.write(root / path, recordings.tone(seconds, 100 + 10 * int(speaker), seed=utterance))
                lists["wav.scp"].append(f"{name}\t{path}\n")
                lists["utt2spk"].append(f"{name}\t{speaker}\n")
        for name, lines in lists.items():
            (root / part).mkdir(exist_ok=True)
            (root / part / name).write_text("".join(lines))
    with tarfile.open(place / "speechocean762.tar.gz", "w:gz") as archive:
        archive.add(root, "speechocean762")


@pytest.mark.parametrize("damage", ["checksum", "deflate", "password"])
def test_a_broken_archive_is_one_line(tmp_path, damage):
    place = tmp_path / ("a.zip" if damage == "password" else "a.tar.gz")
    if damage != "password":
        noise = random.Random(0).randbytes(1 << 16)  # which gzip stores as it is; as letters it is packed
        (tmp_path / "noise").write_bytes(noise if damage == "checksum" else noise.hex().encode())
        with tarfile.open(place, "w:gz") as archive:
            archive.add(tmp_path / "noise", "inside/noise")
        held = bytearray(place.read_bytes())
        held[30_000:30_100] = b"\xff" * 100
    else:
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("inside/noise", b"noise")
        held = bytearray(place.read_bytes())
        for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            held[held.index(mark) + flags] |= 1  # "encrypted", in both headers
    place.write_bytes(held)
    with pytest.raises(UserError, match=f"cannot unpack {place}"):
        layouts._unpack([place], tmp_path, "inside")
    assert not list(tmp_path.glob(".unpacking-*"))


def test_speechocean762_from_its_archive_to_trials(served, tmp_path, monkeypatch, capsys):
    place, address = served
    speechocean(place)
    monkeypatch.setattr(layouts, "SO762_LEAST", 2)
    monkeypatch.setattr(layouts, "SO762_TRIALS", {"targets": 6, "nontargets": 8, "matched": 0.5})
    flags = ["--corpus=speechocean762", f"--out={tmp_path / 'so762'}", f"--mirror={address}"]
    assert run(monkeypatch, "lay_out", *flags) == 0
    told = capsys.readouterr().out
    assert "dev: 6 utterances of 3 speakers\ntrain: 6 utterances of 3 speakers\n" in told
    dev = open_source(tmp_path / "so762" / "dev")
    assert dev.speaker_names == ("so762_0024", "so762_0044", "so762_0093") and dev.ages["so762_0024"] == 6
    assert len(dev.load(0)) == 40_000 and dev.ids[0] == "so762_0024-000240010"
    trials = open_trials(str(tmp_path / "so762" / "dev" / "trials.txt"), dev)
    assert trials.label.sum() == 3 and len(trials) == 3 + 8  # each of three speakers has one pair
    assert not {"so762_0024", "so762_0044"} & set(open_source(tmp_path / "so762" / "train").speakers)
    # Again: nothing is fetched or unpacked, and the lists are the same.
    before = (tmp_path / "so762" / "dev" / "trials.txt").read_text()
    (tmp_path / "so762" / "archives" / "speechocean762.tar.gz").touch()
    monkeypatch.setattr(tarfile, "open", None)
    assert run(monkeypatch, "lay_out", *flags) == 0
    assert (tmp_path / "so762" / "dev" / "trials.txt").read_text() == before


def voxceleb(place, release):
    """The release with stand-ins for its files in `place`, and with their hashes."""
    for parts, speaker in zip(release.archives, ("id10270", "id10001")):
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            for name in (f"wav/{speaker}/a/00001.wav", f"wav/{speaker}/b/00001.wav"):
                archive.write(recordings.write(place / name), name)
        data = held.getvalue()
        cuts = [len(data) * number // len(parts) for number in range(len(parts) + 1)]
        for part, start, end in zip(parts, cuts, cuts[1:]):
            (place / part.name).write_bytes(data[start:end])
    for one in release.beside:
        (place / one.name).write_text("1 id10270/a/00001.wav id10270/b/00001.wav\n")

    def hashed(one):
        return dataclasses.replace(one, md5=hashlib.md5((place / one.name).read_bytes()).hexdigest())

    archives = tuple(tuple(map(hashed, parts)) for parts in release.archives)
    return dataclasses.replace(release, archives=archives, beside=tuple(map(hashed, release.beside)))


def test_voxceleb1_from_parts_of_its_archives(served, tmp_path):
    place, address = served
    release = voxceleb(place, layouts.RELEASES["voxceleb1"])
    out, archives = tmp_path / "vox", tmp_path / "brought"
    with pytest.raises(UserError, match="vox1_test_wav.zip is missing: ask for it at https://www.robots.ox.ac.uk"):
        layouts.lay_out(release, out, archives)
    told = layouts.lay_out(release, out, archives, address)
    assert told[0].endswith("4 utterances of 2 speakers")
    assert len(open_trials(str(out / "veri_test2.txt"), open_source(out))) == 1
    # A part that is damaged is told, before anything is unpacked.
    (archives / "vox1_dev_wav_partab").write_bytes(b"other")
    with pytest.raises(UserError, match="vox1_dev_wav_partab is damaged or another file: its MD5 is"):
        layouts.lay_out(release, tmp_path / "again", archives)


def test_a_corpus_that_is_laid_out_needs_its_archives_no_more(tmp_path, monkeypatch):
    place, out = tmp_path / "brought", tmp_path / "vox"
    place.mkdir()
    release = voxceleb(place, layouts.RELEASES["voxceleb1"])
    told = layouts.lay_out(release, out, place)
    monkeypatch.setattr(layouts, "check_md5", None)  # nothing is hashed again
    assert layouts.lay_out(release, out, place) == told
    shutil.rmtree(place)
    monkeypatch.setattr(layouts, "download", None)
    assert layouts.lay_out(release, out, place) == told
    shutil.rmtree(out / "wav")
    with pytest.raises(UserError, match="is missing: ask for it"):
        layouts.lay_out(release, out, place)


def test_an_archive_writes_nothing_outside(tmp_path):
    one = layouts.Source("x.tar.gz")
    release = layouts.Release(((one,),), ("speechocean762",), (), lambda out: [])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../outside")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="cannot unpack .*x.tar.gz"):
        layouts.lay_out(release, tmp_path / "out", tmp_path)
    assert not (tmp_path / "outside").exists() and not list((tmp_path / "out").glob(".unpacking-*"))


def test_downloads_that_fail_leave_nothing(served, tmp_path):
    place, address = served
    (place / "a").write_text("abc")
    for name, md5, message in (
        ("absent", "", "cannot download .*absent: File not found"),
        ("a", "0" * 32, "is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            download.download(f"{address}/{name}", tmp_path / "b", md5)
    with pytest.raises(UserError, match="must begin with https:// or http://"):
        download.download("file:///etc/passwd", tmp_path / "b")
    assert not list(tmp_path.glob("*b*"))
    assert download.download(f"{address}/a", tmp_path / "b", "900150983cd24fb0d6963f7d28e17f72").read_text() == "abc"


def test_a_list_is_drawn_from_data_that_has_none(tmp_path, monkeypatch, capsys):
    data, out = "synthetic:dev?speakers=6&utterances=4", tmp_path / "trials.txt"
    flags = [f"--data={data}", f"--out={out}", "--targets=20", "--nontargets=30", "--matched=1"]
    assert run(monkeypatch, "draw_trials", *flags) == 0
    assert capsys.readouterr().out == f"{out}: 50 trials, 20 of them targets\n"
    table = open_source(data)
    trials = open_trials(str(out), table)
    gender = [table.genders[name] for name in table.speakers]
    assert all(gender[a] == gender[b] for a, b in zip(trials.enrol, trials.test))
    assert len(set(zip(trials.enrol.tolist(), trials.test.tolist()))) == 50
    recordings.kaldi(tmp_path / "k")
    assert run(monkeypatch, "draw_trials", f"--data={tmp_path / 'k'}", f"--out={out}", "--matched=0.5") == 2
    assert "gender and group of ages: --matched must be 0" in capsys.readouterr().err
