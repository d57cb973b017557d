import os
import pickle
import shutil
import struct
import subprocess

import numpy as np
import pytest
import recordings
import scipy.signal
import soundfile

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio


def test_sixteen_bit_wav_is_read_exactly(tmp_path):
    samples = np.random.default_rng(0).integers(-30000, 30000, 16000).astype(np.int16)
    path = recordings.write(tmp_path / "a.wav", samples)
    wave = audio.read_audio(path)
    assert wave.dtype == np.float32
    np.testing.assert_array_equal(wave, samples / 32768.0)
    np.testing.assert_array_equal(audio.to_int16(wave), samples)


def test_int16_rounding_clips():
    np.testing.assert_array_equal(
        audio.to_int16(np.array([-2.0, -1.0, 0.4 / 32768, 0.6 / 32768, 1.0])), [-32768, -32768, 0, 1, 32767]
    )


def test_stereo_is_mixed_and_opposite_channels_cancel(tmp_path):
    left, right = recordings.tone(hertz=200), recordings.tone(hertz=300, seed=1)
    path = recordings.write(tmp_path / "a.flac", np.stack((left, right), axis=1), subtype="PCM_24")
    np.testing.assert_allclose(audio.read_audio(path), (left + right) / 2, atol=2e-7)
    with pytest.raises(audio.AudioError, match="silent"):
        audio.read_audio(recordings.write(tmp_path / "b.wav", np.stack((left, -left), axis=1)))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    time = np.arange(rate) / rate
    path = recordings.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    wave = audio.read_audio(path)
    assert len(wave) == audio.num_samples(path) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(wave[1000:-1000], expected[1000:-1000], atol=2e-3)


def test_resampling_agrees_with_scipy():
    wave = scipy.signal.lfilter(*scipy.signal.butter(6, 0.2), np.random.default_rng(0).normal(size=48000)).astype(
        np.float32
    )
    ours, theirs = audio.resample(wave, 48000), scipy.signal.resample_poly(wave, 1, 3)
    assert np.abs(ours - theirs)[500:-500].max() < 0.01 * np.abs(theirs).max()


def test_part_of_a_lossless_file_equals_that_part(tmp_path):
    path = recordings.write(tmp_path / "a.flac", recordings.tone(3))
    whole = audio.read_audio(path)
    np.testing.assert_array_equal(audio.read_audio(path, start=1.25, seconds=0.5), whole[20000:28000])
    assert audio.is_exact(path)
    assert not audio.is_exact(recordings.write(tmp_path / "b.wav", recordings.tone(rate=8000), 8000))


def _broken(folder, kind):
    path = folder / f"{kind}.wav"
    if kind == "missing":
        return path
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        recordings.write(path, np.zeros(0, np.float32))
    elif kind == "text":
        path.write_text("this is not audio, whatever its name says\n" * 30)
    elif kind == "folder":
        path.mkdir()
    elif kind == "silent":
        recordings.write(path, np.full(16000, 0.25, np.float32))
    elif kind == "short":
        recordings.write(path, recordings.tone(0.05))
    elif kind in ("nan", "inf"):
        wave = recordings.tone()
        wave[77] = float(kind)
        recordings.write(path, wave, subtype="FLOAT")
    elif kind == "low rate":
        recordings.write(path, recordings.tone(rate=4000), 4000)
    elif kind == "high rate":
        recordings.write(path, recordings.tone(rate=16000), 1000003)
    else:
        path = recordings.write(folder / f"a.{kind}", recordings.tone(4))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "missing"),
        ("empty", "empty"),
        ("header", "empty"),
        ("text", "unreadable"),
        ("folder", "unreadable"),
        ("silent", "silent"),
        ("short", "too short (0.05 s)"),
        ("nan", "values that are not finite"),
        ("inf", "values that are not finite"),
        ("low rate", "sample rate 4000 Hz"),
        ("high rate", "sample rate 1000003 Hz"),
        ("wav", "truncated"),
        ("flac", "truncated"),
        ("ogg", "truncated"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, kind, reason):
    path = _broken(tmp_path, kind)
    with pytest.raises(audio.AudioError) as caught:
        audio.read_audio(path)
    assert caught.value.reason.startswith(reason)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it
    assert (again.path, again.reason) == (caught.value.path, caught.value.reason)


def test_header_that_claims_hours_allocates_nothing(tmp_path):
    path = recordings.write(tmp_path / "a.flac")
    data = bytearray(path.read_bytes())
    at = 8 + 13  # STREAMINFO: 36 bits of sample count begin in the middle of its 14th byte
    data[at : at + 5] = bytes([data[at] | 0x0F]) + b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert soundfile.info(path).frames > 1 << 35
    with pytest.raises(audio.AudioError, match="too long|truncated"):
        audio.read_audio(path)


def test_wav_written_to_a_pipe_has_no_length_and_is_read(tmp_path):
    path = recordings.write(tmp_path / "a.wav")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert len(audio.read_audio(path)) == 16000


def test_long_recordings_are_refused(tmp_path):
    path = recordings.write(tmp_path / "a.wav", recordings.tone(2))
    with pytest.raises(audio.AudioError, match="too long"):
        audio.read_audio(path, max_seconds=1)


def test_m4a_without_ffmpeg_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0" * 100)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(audio.AudioError, match="m4a files need the ffmpeg program"):
        audio.read_audio(path)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for ffmpeg")
def test_m4a_is_decoded_by_ffmpeg(tmp_path, monkeypatch):
    # Stands for ffmpeg: it checks what it is asked for and gives a known signal, or fails as ffmpeg does.
    path = tmp_path / "-a b.m4a"
    path.write_bytes(b"m4a")
    wave = recordings.tone()
    wave.astype("<f4").tofile(tmp_path / "pcm")
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    arguments = f'*"file:{path} "*"-ac 1 -ar 16000 -f f32le pipe:1"'
    program.write_text(
        f'#!/bin/sh\ncase "$*" in {arguments}) exec /bin/cat "{tmp_path}/pcm" ;; esac\n'
        'echo "moov atom not found" >&2; exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    np.testing.assert_array_equal(audio.read_audio(path), wave)
    other = tmp_path / "other.m4a"
    other.write_bytes(b"m4a")
    with pytest.raises(audio.AudioError, match=r"unreadable \(ffmpeg: moov atom not found\)"):
        audio.read_audio(other)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for ffmpeg")
def test_a_part_of_an_m4a_is_bounded_too(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"m4a")
    recordings.tone(2).astype("<f4").tofile(tmp_path / "pcm")
    (tmp_path / "ffmpeg").write_text(f'#!/bin/sh\necho "$*" >"{tmp_path}/asked"; exec /bin/cat "{tmp_path}/pcm"\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(audio.AudioError, match=r"too long \(over 1 s\)"):
        audio.read_audio(tmp_path / "a.m4a", start=0.00001, seconds=1e6, max_seconds=1)
    assert " -ss 0.000010 -t 2.000000 " in (tmp_path / "asked").read_text()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_m4a_by_the_real_ffmpeg(tmp_path):
    wav = recordings.write(tmp_path / "a.wav", np.stack([recordings.tone(4, rate=44100)] * 2, axis=1), 44100)
    path = tmp_path / "-a b.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-movflags", "faststart", f"file:{path}"], check=True)
    expected = audio.read_audio(wav)
    wave, part = audio.read_audio(path), audio.read_audio(path, start=1.0, seconds=0.5)
    assert len(wave) == len(expected) == audio.num_samples(path) and len(part) == 8000
    assert np.corrcoef(wave, expected)[0, 1] > 0.99  # the encoder's delay is taken off
    assert np.corrcoef(part, expected[16000:24000])[0, 1] > 0.99
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError, match=r"unreadable \(ffmpeg: [^@]*$"):
        audio.read_audio(path)


def test_samples_in_memory():
    stereo = np.stack((recordings.tone(rate=48000), recordings.tone(rate=48000, seed=1)), axis=1)
    assert audio.to_mono_16k(stereo, 48000).shape == (16000,)
    np.testing.assert_array_equal(audio.to_mono_16k(np.array([16384, -32768], np.int16), 16000), np.float32([0.5, -1]))
    for wave, rate, message in [
        (np.zeros((2, 2, 2)), 16000, "must be"),
        (np.zeros(3, np.int64), 16000, "must be"),
        (np.zeros(3), 100, "sample rate"),
        (np.array([np.inf]), 16000, "not finite"),
        (np.zeros((100, 0)), 16000, r"\(100, 0\) has no channels"),
        (np.zeros((0, 100)), 16000, "has no channels"),
    ]:
        with pytest.raises(UserError, match=message):
            audio.to_mono_16k(wave, rate)


@pytest.mark.parametrize(("samples", "rate"), [(8525, 8525), (17050, 8525), (44100, 44100), (44101, 44100)])
def test_the_length_that_is_foretold_is_that_of_resampling(samples, rate):
    exact = -(-samples * 16000 // rate)
    assert audio.resampled_length(samples, rate) == len(audio.resample(np.zeros(samples, np.float32), rate)) == exact


def test_real_speech(shared):
    paths = sorted((shared / "data/so762/dev/audio").glob("*/*"))[::100]
    assert len(paths) > 10
    for path in paths:
        wave = audio.read_audio(path)
        assert len(wave) == audio.num_samples(path) == soundfile.info(path).frames
        assert 0.001 < wave.std() < 0.5


def test_channels_are_told_from_samples():
    left, right = np.zeros(16000, np.float32), np.full(16000, 0.5, np.float32)
    for both in (np.stack([left, right]), np.stack([left, right], axis=1)):
        np.testing.assert_array_equal(audio.to_mono_16k(both, 16000), np.full(16000, 0.25, np.float32))
    with pytest.raises(UserError, match=r"audio of shape \(40, 16000\) has more than 32 channels"):
        audio.to_mono_16k(np.zeros((40, 16000), np.float32), 16000)


@pytest.mark.parametrize("rate", [7999, 8000, 22050, 44100, 48000])
def test_a_tone_stays_a_tone_when_resampled(rate):
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    expected = np.sin(2 * np.pi * 1000 * np.arange(audio.SAMPLE_RATE) / audio.SAMPLE_RATE)
    inside = slice(500, -500)  # the filter sees silence beyond the ends
    np.testing.assert_allclose(audio.resample(tone.astype(np.float32), rate)[inside], expected[inside], atol=1e-4)


@pytest.mark.slow  # librosa compiles for half a minute
@pytest.mark.parametrize("rate", [7999, 8000, 22050, 44100, 48000])
@pytest.mark.parametrize("samples", [1, 3, 12345])
def test_resampling_is_librosa_s(rate, samples):
    librosa = pytest.importorskip("librosa", reason="librosa is not installed")
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    theirs = librosa.resample(wave, orig_sr=rate, target_sr=audio.SAMPLE_RATE, res_type="soxr_hq")
    np.testing.assert_array_equal(audio.resample(wave, rate), theirs)
