import contextlib
import struct

import numpy as np
import pytest
import recordings
import soundfile

from kmq_jax.data import audio

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "extensible": ("WAVEX", "PCM_24"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ulaw": ("WAV", "ULAW"),
    "adpcm": ("WAV", "IMA_ADPCM"),
    "ulaw.sph": ("NIST", "ULAW"),
}


def _write(folder, kind, seconds=2.0):
    form, subtype = FORMATS[kind]
    return recordings.write(folder / f"a.{kind}", recordings.tone(seconds), format=form, subtype=subtype)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_file_that_was_cut_short_is_refused(tmp_path, kind, share):
    path = _write(tmp_path, kind)
    data = path.read_bytes()
    # AAC and ADPCM pad their last block.
    assert 32000 <= len(audio.read_audio(path)) < 32000 + 1024
    assert audio.num_samples(path) == len(audio.read_audio(path))
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(audio.AudioError, match="truncated|unreadable"):
        audio.read_audio(path)


def _erased(data: bytes, kind: str, size: bytes) -> bytes:
    """The file with the lengths in its header erased, as a writer to a pipe leaves them."""
    data = bytearray(data)

    def put(at: int, new: bytes) -> None:
        data[at : at + len(new)] = new

    if kind == "wav":
        put(4, size)
        put(data.index(b"data") + 4, size)
    elif kind == "rf64":
        put(data.index(b"ds64") + 8, 2 * size + 8 * b"\0")
    elif kind == "w64":
        put(16, 2 * size)
        put(data.index(b"data\xf3") + 16, 2 * size)
    elif kind == "aiff":
        put(4, size)
        put(data.index(b"COMM") + 10, bytes(4))
        put(data.index(b"SSND") + 4, size)
    elif kind == "au":
        put(8, size)
    elif kind == "caf":
        put(data.index(b"data") + 4, 2 * size)
    elif kind == "flac":
        put(21, bytes([data[21] & 0xF0]) + bytes(4))
    return bytes(data)


@pytest.mark.parametrize("kind", ["wav", "rf64", "w64", "aiff", "au", "caf", "flac"])
@pytest.mark.parametrize("size", [bytes(4), b"\xff" * 4])
def test_a_header_that_does_not_know_its_length_is_read_to_the_end(tmp_path, kind, size):
    path = _write(tmp_path, kind)
    expected = audio.read_audio(path)
    path.write_bytes(_erased(path.read_bytes(), kind, size))
    np.testing.assert_array_equal(audio.read_audio(path), expected)
    assert audio.num_samples(path) == len(expected)
    np.testing.assert_array_equal(audio.read_audio(path, start=0.5, seconds=0.25), expected[8000:12000])
    with pytest.raises(audio.AudioError, match="too long"):
        audio.read_audio(path, max_seconds=1)


def _chunk(kind: str, name: bytes, content: bytes) -> bytes:
    if kind == "w64":  # names of 16 bytes, a length that counts them and itself, eighths
        whole = struct.pack("<Q", 24 + len(content)) + content
        return name + bytes.fromhex("f3acd3118cd100c04f8edb8a") + whole + bytes(-len(whole) % 8)
    order = ">" if kind == "aiff" else "<"
    return name + struct.pack(order + "I", len(content)) + content + bytes(len(content) % 2)


@pytest.mark.parametrize("kind", ["wav", "rf64", "w64", "aiff"])
@pytest.mark.parametrize("size", [bytes(4), b"\xff" * 4])
def test_chunks_behind_sound_of_unknown_length_are_no_sound(tmp_path, kind, size):
    path = _write(tmp_path, kind)
    expected = audio.read_audio(path)
    data = _erased(path.read_bytes(), kind, size)
    names = {"aiff": (b"ANNO", b"ID3 "), "w64": (b"bext", b"levl")}.get(kind, (b"LIST", b"id3 "))
    behind = [_chunk(kind, names[0], b"INFO" + names[0] + bytes(9)), _chunk(kind, names[1], b"ID3" + bytes(100))]
    for sound, tail in ((path.read_bytes(), behind[0]), (data, behind[0]), (data, b"".join(behind))):
        path.write_bytes(sound + tail)
        np.testing.assert_array_equal(audio.read_audio(path), expected)
        assert audio.num_samples(path) == len(expected)
    path.write_bytes(data + behind[0][:-2])  # cut: from where it stands to the end it is no chunk
    assert len(audio.read_audio(path)) > len(expected)


def test_looking_for_chunks_takes_no_longer_than_the_file_is_long(tmp_path):
    path = _write(tmp_path, "wav")
    path.write_bytes(_erased(path.read_bytes(), "wav", bytes(4)) + b"LIST\0\0\0\0" * 100_000 + b"LIST\1\0\0\0")
    assert audio.num_samples(path) > 32_000


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (44100, 1)])
@pytest.mark.parametrize("samples", [1000, 4096, 40961])
def test_flac_of_unknown_length_ends_where_its_last_frame_does(tmp_path, rate, channels, samples):
    wave = 0.1 * np.random.default_rng(samples).normal(size=(samples, channels))
    path = recordings.write(tmp_path / "a.flac", wave, rate)
    expected = audio.read_audio(path, min_seconds=0)
    path.write_bytes(_erased(path.read_bytes(), "flac", b""))
    np.testing.assert_array_equal(audio.read_audio(path, min_seconds=0), expected)


def test_mp3_without_a_tag_has_the_length_that_is_decoded(tmp_path):
    path = _write(tmp_path, "mp3", 5.0)
    data = path.read_bytes()
    bits = {0xF3: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}[data[1]]
    frame = 72 * 1000 * bits[data[2] >> 4] // 16000 + (data[2] >> 1 & 1)  # MPEG 2, layer III, 16 kHz
    assert data[frame] == 0xFF and b"Info" in data[:frame] or b"Xing" in data[:frame]
    path.write_bytes(data[frame:])
    assert audio.num_samples(path) == len(audio.read_audio(path))
    assert abs(len(audio.read_audio(path)) - 80000) < 3000  # what an encoder adds in front and behind


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "aiff"])
def test_a_tag_in_front_hides_nothing(tmp_path, kind):
    path = _write(tmp_path, kind)
    data, expected = path.read_bytes(), audio.read_audio(path)
    tag = b"ID3\3\0\0\0\0\0\x0a" + bytes(10)
    path.write_bytes(tag + data)
    np.testing.assert_array_equal(audio.read_audio(path), expected)
    if kind in ("wav", "flac"):
        path.write_bytes(tag + _erased(data, kind, bytes(4)))
        np.testing.assert_array_equal(audio.read_audio(path), expected)
    path.write_bytes(tag + data[: int(0.6 * len(data))])
    with pytest.raises(audio.AudioError, match="truncated"):
        audio.read_audio(path)


@pytest.mark.parametrize("kind", ["ogg", "opus", "mp3"])
@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125)])
def test_joined_recordings_of_which_the_first_alone_would_be_read_are_refused(tmp_path, kind, between):
    if between and kind != "mp3":
        pytest.skip("a tag of MP3")
    path = _write(tmp_path, kind)
    data = path.read_bytes()
    path.write_bytes(data + between + data)
    with pytest.raises(audio.AudioError, match="joined"):
        audio.read_audio(path)


@pytest.mark.parametrize("form", ["VOC", "IRCAM", "MAT5", "PVF", "AVR", "PAF"])
def test_a_container_in_which_a_cut_does_not_show_is_refused(tmp_path, form):
    path = recordings.write(tmp_path / "a.wav", recordings.tone(), format=form, subtype="PCM_16")
    for read in (audio.read_audio, audio.num_samples):
        with pytest.raises(audio.AudioError, match=f"{form} files are not read"):
            read(path)


@pytest.mark.parametrize("size", [bytes(4), b"\xff" * 4])
def test_an_empty_recording_with_chunks_behind_it_is_empty(tmp_path, size):
    path = recordings.write(tmp_path / "a.wav", np.zeros(0, np.float32), subtype="PCM_16")
    path.write_bytes(_erased(path.read_bytes(), "wav", size) + b"LIST" + struct.pack("<I", 4) + b"INFO")
    with pytest.raises(audio.AudioError, match="empty"):
        audio.read_audio(path)


def test_values_outside_full_scale(tmp_path):
    wave = recordings.tone()
    path = recordings.write(tmp_path / "a.wav", 20000 * wave, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match=r"values up to \d+(\.\d+)?, where full scale is 1"):
        audio.read_audio(path)
    loud = wave.copy()
    loud[100:110] = 1.5  # a few samples are clipped, as 16 bits would have it
    read = audio.read_audio(recordings.write(path, loud, subtype="FLOAT"))
    np.testing.assert_array_equal(read, np.clip(loud, -1, 1))
    np.testing.assert_array_equal(audio.from_int16(audio.to_int16(read))[100:110], np.full(10, 32767 / 32768))
    with pytest.raises(audio.AudioError, match="full scale"):
        audio.read_audio(recordings.write(path, 5 * wave, subtype="DOUBLE"))


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.wav")
    for read in (audio.read_audio, audio.num_samples, audio.is_exact):
        with pytest.raises(audio.AudioError, match="not a file"):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_raise_audio_errors_only(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for kind in FORMATS:
        data = bytearray(_write(tmp_path, kind, 0.3).read_bytes())
        for at in rng.integers(0, min(len(data), 200), 6):
            data[at] = rng.integers(256)
        path = tmp_path / f"b.{kind}"
        path.write_bytes(data)
        for read in (audio.read_audio, audio.num_samples):
            with contextlib.suppress(audio.AudioError):
                read(path)


def test_people_s_files(shared):
    cases = shared / "cases"
    if not cases.is_dir():
        pytest.skip("no cases")
    assert len(audio.read_audio(cases / "flac_unknown_length/data/spk/a.flac")) == 79312
    assert len(audio.read_audio(cases / "wav_data_size_0/hdr_0.wav")) == (158668 - 44) // 2
    for path in (cases / "float_not_normalised/data").rglob("*.wav"):
        assert np.abs(soundfile.read(path)[0]).max() > 10000
        with pytest.raises(audio.AudioError, match="full scale"):
            audio.read_audio(path)
