"""How much sound an audio file's header promises, and how much lies in the file.

libsndfile reads what is there without a word: a file that was cut short looks like a shorter recording, and one whose
writer never came back to fill in the length looks empty. So the containers that it reads are looked into here.

Layouts: RIFF and RF64 (EBU Tech 3306), W64 (Sony Wave64), AIFF 1.3, Sun AU, NIST SPHERE, CAF, Ogg (RFC 3533), and the
Xing, Info and VBRI tags of MP3, FLAC (RFC 9639).
"""

import io
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

_MOST_CHUNKS = 10_000
_UNKNOWN = (0, 0x7FFFF000)  # sizes that writers who cannot know leave: 0, or close to 2^31 or 2^32
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of the identifiers of Wave64's chunks, but for the first
_LARGEST_MP3 = 1 << 30  # bytes that are walked through; four hours take at most half of it
_LONGEST_FRAME = 1441  # bytes of layer III
_LONGEST_TAIL = 1 << 24  # bytes at the end in which chunks behind sound are looked for; pictures take most of them


@dataclass(frozen=True)
class Chunks:
    """How a container writes the chunks that may stand behind its sound.

    Attributes:
        names: what they are called.
        head: bytes of a name and a length.
        length: how the length is written, for `struct`.
        whole: the length counts the head, too.
        align: each begins at a multiple of so many bytes behind the one before.
    """

    names: re.Pattern[bytes]
    head: int = 8
    length: str = "<I"
    whole: bool = False
    align: int = 2

    def next(self, data: bytes, place: int) -> int:
        """The place behind the chunk that begins at a place."""
        width = struct.calcsize(self.length)
        (length,) = struct.unpack_from(self.length, data, place + self.head - width)
        end: int = place + max(length, self.head) if self.whole else place + self.head + length
        # Filled up to a multiple of `align`, except perhaps at the end of the file.
        return end if end == len(data) else end + -(end - place) % self.align


_RIFF_NAMES = re.compile(
    rb"LIST|fact|PEAK|bext|id3 |ID3 |cue |smpl|inst|iXML|axml|_PMX|plst|note|labl|ltxt|JUNK|junk|PAD |FLLR|DISP|levl|"
    rb"acid|strc|afsp|cart|chna|umid|minf|elm1|regn|DGDA"
)
_AIFF_NAMES = re.compile(rb"COMT|MARK|INST|NAME|AUTH|\(c\) |ANNO|ID3 |APPL|AESD|MIDI|PEAK|CHAN|basc|trns|cate|FVER")
_W64_NAMES = re.compile(
    rb"list\x2f\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0|[a-z ]{4}" + re.escape(_W64_TAIL), re.DOTALL
)


@dataclass(frozen=True)
class Extent:
    """Where the sound of a file lies.

    Attributes:
        truncated: the file ends before the sound that its header promises.
        unknown: the header does not tell the length.
        joined: several recordings lie one behind the other; libsndfile reads the first alone.
        patches: bytes by place in the file, for a header that tells the length (`Patched`), where it is needed.
        skipped: bytes at the front that are left out.
        prefix: what stands in their place.
        end: the place in the file behind which nothing is read; 0: its end.
    """

    truncated: bool = False
    unknown: bool = False
    joined: bool = False
    patches: Mapping[int, bytes] = field(default_factory=dict)
    skipped: int = 0
    prefix: bytes = b""
    end: int = 0

    @property
    def mends(self) -> bool:
        """Whether the file is read otherwise than it lies."""
        return bool(self.patches or self.prefix or self.skipped or self.end)


def extent(path: Path) -> Extent:
    """Looks into a file; of an unknown container nothing is known.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.stat(path).st_size
    with path.open("rb") as file:
        begin = _behind_tags(file)
    with io.BufferedReader(Patched(path, Extent(skipped=begin))) if begin else path.open("rb") as inside:
        try:
            found = _look(inside, size - begin)
        except struct.error:  # the file ends within a header
            return Extent(truncated=True)
    if not begin:
        return found
    patches = {begin + place: new for place, new in found.patches.items()}
    return replace(found, skipped=begin + found.skipped, patches=patches, end=found.end and begin + found.end)


def _behind_tags(file: BinaryIO) -> int:
    """Where the container begins, behind the ID3 tags that some programs put in front of any format."""
    begin, length = 0, 1
    while length:
        file.seek(begin)
        length = _tag_size(file.read(10))
        begin += length
    return begin


def _tag_size(head: bytes) -> int:
    """Bytes of the ID3 tag, version 2, that begins so; 0 where none does."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    # Seven bits a byte, so that no length looks like the start of a frame.
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))


def _look(file: BinaryIO, size: int) -> Extent:
    head = file.read(40)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return _riff(file, size, head[:4])
    if head[:4] in (b".snd", b"dns."):
        return _au(head, size)
    if head[:8] == b"fLaC\0\0\0\x22":
        return _flac(file, head, size)
    kinds = {b"riff": _w64, b"FORM": _aiff, b"NIST": _sphere, b"caff": _caf, b"OggS": _ogg}
    return kinds.get(head[:4], _mp3)(file, size)


class Patched(io.RawIOBase):
    """A file, with some of its bytes replaced as it is read; the file on disk is not changed."""

    def __init__(self, path: Path, extent: Extent):
        """Opens the file."""
        self._file, self._extent, self._at = path.open("rb"), extent, 0
        self._shift = len(extent.prefix) - extent.skipped  # from a place in the file to the place it is read at
        self._size = (extent.end or os.stat(path).st_size) + self._shift

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:  # noqa: D102
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # noqa: D102
        prefix = self._extent.prefix
        data = bytearray(prefix[self._at : self._at + len(buffer)])
        start = max(self._at, len(prefix)) - self._shift  # in the file itself
        self._file.seek(start)
        read = bytearray(self._file.read(max(min(len(buffer), self._size - self._at) - len(data), 0)))
        for place, new in self._extent.patches.items():
            for i, byte in enumerate(new):
                if 0 <= place + i - start < len(read):
                    read[place + i - start] = byte
        data += read
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:  # noqa: D102
        self._file.close()
        super().close()


def _of(begin: int, promised: int, size: int, unknown: bool, patches: Mapping[int, bytes]) -> Extent:
    """The extent of sound that begins at a place, with as many bytes as the header promises."""
    return _patched(begin, size, size, patches) if unknown else Extent(truncated=begin + promised > size)


def _patched(begin: int, end: int, size: int, patches: Mapping[int, bytes]) -> Extent:
    """The extent of sound whose length the header does not tell; where nothing lies behind that, it is empty."""
    return Extent(unknown=True, patches=patches if size > begin else {}, end=end if begin <= end < size else 0)


def _sound_end(file: BinaryIO, begin: int, size: int, chunks: Chunks) -> int:
    """Where sound of unknown length ends: before chunks that reach from there to the end of the file exactly."""
    tail = max(begin, size - _LONGEST_TAIL)
    if tail >= size:
        return begin
    file.seek(tail)
    data = file.read(size - tail)
    first = len(data)
    good = {first}  # places from which chunks reach to the end; backwards, so that each is looked at once
    for place in sorted((found.start() for found in chunks.names.finditer(data)), reverse=True):
        if place + chunks.head <= len(data) and chunks.next(data, place) in good:
            good.add(place)
            first = place
    return tail + first


def _riff(file: BinaryIO, size: int, kind: bytes) -> Extent:
    order = ">" if kind == b"RIFX" else "<"
    file.seek(12)
    wide, wide_place = None, 0
    for _ in range(_MOST_CHUNKS):
        place = file.tell()
        chunk = file.read(8)
        if len(chunk) < 8:
            # Without its sound the file was cut within what comes before.
            return Extent(truncated=place <= size and wide_place == 0 and size > 12)
        name, length = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        if name == b"ds64" and length >= 24:
            wide_place = place + 8
            wide = struct.unpack("<Q", file.read(16)[8:])[0]  # behind the size of the whole stands that of the sound
            file.seek(place + 8)
        elif name == b"data":
            begin = place + 8
            if kind == b"RF64" and wide is not None and length == 0xFFFFFFFF:
                if 0 < wide < 1 << 62:
                    return Extent(truncated=begin + wide > size)
                end = _sound_end(file, begin, size, Chunks(_RIFF_NAMES))
                return _patched(begin, end, size, {wide_place + 8: struct.pack("<Q", end - begin)})
            if length and not (length >= _UNKNOWN[1] and begin + length > size):
                return Extent(truncated=begin + length > size)
            end = _sound_end(file, begin, size, Chunks(_RIFF_NAMES, length=order + "I"))
            told = struct.pack(order + "I", min(end - begin, 0xFFFFFFFF))
            whole = struct.pack(order + "I", min(end - 8, 0xFFFFFFFF))
            return _patched(begin, end, size, {4: whole, place + 4: told})
        file.seek(place + 8 + length + length % 2)  # chunks begin at even places
    return Extent(truncated=True)


def _w64(file: BinaryIO, size: int) -> Extent:
    place = 40  # behind two identifiers of 16 bytes and a length of 8
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        chunk = file.read(24)
        if len(chunk) < 24:
            return Extent(truncated=True)
        name, length = chunk[:16], struct.unpack("<Q", chunk[16:])[0]
        if name == b"data" + _W64_TAIL:
            begin = place + 24
            if 24 < length < 1 << 62:
                # libsndfile takes what lies behind for sound, although the length is told.
                return Extent(truncated=place + length > size, end=place + length if place + length < size else 0)
            end = _sound_end(file, begin, size, Chunks(_W64_NAMES, 24, "<Q", whole=True, align=8))
            told = {16: struct.pack("<Q", end), place + 16: struct.pack("<Q", max(end - place, 24))}
            return _patched(begin, end, size, told)
        place += max(length + 7 & ~7, 24)  # up to a multiple of 8; at least the head, so that the walk goes on
    return Extent(truncated=True)


def _aiff(file: BinaryIO, size: int) -> Extent:
    file.seek(12)
    common = None
    for _ in range(_MOST_CHUNKS):
        place = file.tell()
        chunk = file.read(8)
        if len(chunk) < 8:
            return Extent(truncated=True)
        name, length = chunk[:4], struct.unpack(">I", chunk[4:])[0]
        if name == b"COMM":
            channels, frames, bits = struct.unpack(">hIh", file.read(8))
            common = place + 10, channels * ((bits + 7) // 8), frames  # place of the count, bytes a frame, the count
            file.seek(place + 8)
        elif name in (b"SSND", b"BODY"):
            begin = place + 8 + (8 if name == b"SSND" else 0)  # an offset and a block size come first in SSND
            known = begin - place - 8 < length and not (length >= _UNKNOWN[1] and place + 8 + length > size)
            frames_known = common is None or common[1] <= 0 or common[2] != 0
            if known and frames_known:
                return Extent(truncated=place + 8 + length > size)
            end = place + 8 + length if known else _sound_end(file, begin, size, Chunks(_AIFF_NAMES, length=">I"))
            patches = {4: struct.pack(">I", min(max(end - 8, 0), 0xFFFFFFFF))}
            patches[place + 4] = struct.pack(">I", min(max(end - place - 8, 0), 0xFFFFFFFF))
            if common and common[1] > 0:
                patches[common[0]] = struct.pack(">I", min(max(end - begin, 0) // common[1], 0xFFFFFFFF))
            return _patched(begin, end, size, patches)
        file.seek(place + 8 + length + length % 2)
    return Extent(truncated=True)


def _au(head: bytes, size: int) -> Extent:
    order = ">" if head[:4] == b".snd" else "<"
    begin, length = struct.unpack(order + "II", head[4:12])
    unknown = length == 0 or length >= _UNKNOWN[1]
    return _of(begin, length, size, unknown, {8: struct.pack(order + "I", min(max(size - begin, 0), 0xFFFFFFFE))})


def _sphere(file: BinaryIO, size: int) -> Extent:
    file.seek(0)
    text = file.read(1 << 16)
    fields: dict[bytes, int] = {}
    try:
        begin = int(text.split(b"\n", 2)[1])  # the second line is the length of the header
        for line in text[:begin].split(b"\n"):
            words = line.split()
            # libsndfile writes some numbers as text: `sample_n_bytes -s1 1`.
            if len(words) == 3 and words[2].isdigit():
                fields[words[0]] = int(words[2])
    except (IndexError, ValueError):
        return Extent()
    if b"sample_coding" in text[:begin] and b"shorten" in text[:begin]:
        return Extent()  # compressed: lengths in bytes are not told; libsndfile does not read these
    width = fields.get(b"sample_n_bytes", 0) * fields.get(b"channel_count", 1)
    count = fields.get(b"sample_count", 0)
    return Extent() if not (width and count) else Extent(truncated=begin + width * count > size)


def _caf(file: BinaryIO, size: int) -> Extent:
    place = 8
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        chunk = file.read(12)
        if len(chunk) < 12:
            return Extent(truncated=True)
        name, length = chunk[:4], struct.unpack(">q", chunk[4:])[0]
        if name == b"data":
            # The length counts four bytes before the sound, and is -1 where it is unknown.
            told = {place + 4: struct.pack(">q", max(size - place - 12, 4))}
            return _of(place + 12, length, size, length in (-1, 0, 4), told)
        if length < 0:
            return Extent(truncated=True)
        place += 12 + length
    return Extent(truncated=True)


def _flac(file: BinaryIO, head: bytes, size: int) -> Extent:
    """Where the header does not know the length, the last frame tells it: frames are numbered."""
    told = int.from_bytes(head[21:26], "big")  # the last 36 of these 40 bits count the samples; 0: unknown
    if told & ((1 << 36) - 1):
        return Extent()
    tail = min(size, 1 << 20)
    file.seek(size - tail)
    data = file.read(tail)
    end = len(data)
    while (at := data.rfind(b"\xff", 0, end)) >= 0:
        if (total := _flac_end(data[at : at + 17], head)) is not None:
            return Extent(unknown=True, patches={21: (told | total).to_bytes(5, "big")})
        end = at
    return Extent(truncated=True)


def _flac_end(frame: bytes, head: bytes) -> int | None:
    """The number of the first sample behind a FLAC frame, by its header; None where this is no header."""
    if len(frame) < 6 or frame[1] & 0xFE != 0xF8 or frame[3] & 1:
        return None
    size_code, rate_code, channels = frame[2] >> 4, frame[2] & 15, frame[3] >> 4
    stated = (head[20] >> 1 & 7) + 1  # channels
    if size_code == 0 or rate_code == 15 or (channels + 1 if channels < 8 else 2) != stated:
        return None
    # The number is coded as in UTF-8, in up to seven bytes.
    ones = next((i for i in range(8) if not frame[4] << i & 0x80), 8)
    more = max(ones - 1, 0)
    if ones == 1 or ones == 8 or any(byte & 0xC0 != 0x80 for byte in frame[5 : 5 + more]):
        return None
    number = frame[4] & (0x7F >> ones)
    for byte in frame[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    at = 5 + more
    sizes = {
        1: 192,
        **{code: 576 << code - 2 for code in range(2, 6)},
        **{code: 256 << code - 8 for code in range(8, 16)},
    }
    if size_code in (6, 7):
        width = size_code - 5
        block, at = int.from_bytes(frame[at : at + width], "big") + 1, at + width
    else:
        block = sizes[size_code]
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(frame) or _crc8(frame[:at]) != frame[at]:
        return None
    # With blocks of one size it is frames that are numbered; the last may be shorter.
    return number + block if frame[1] & 1 else number * int.from_bytes(head[8:10], "big") + block


def _crc8(data: bytes) -> int:
    """The checksum of FLAC's frame headers: x^8 + x^2 + x + 1, from zero."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc


def _ogg(file: BinaryIO, size: int) -> Extent:
    """Walks through the pages: whether one runs past the end, the last ends its stream, another stream follows."""
    # A page begins with 27 bytes: byte 5 marks the first (2) and the last page (4) of a stream, byte 26 counts the
    # segments. Their lengths follow, a byte each, and then the segments.
    at, flags, begun, joined = 0, 0, False, False
    while True:
        file.seek(at)
        page = file.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            break  # the end, or tags
        lengths = file.read(page[26])
        at += 27 + len(lengths) + sum(lengths)
        if len(lengths) < page[26] or at > size:
            return Extent(truncated=True)
        flags = page[5]
        joined |= begun and bool(flags & 2)
        begun |= not flags & 2
    # What is left of a page that was cut within its first bytes.
    cut = b"OggS".startswith(page[:4]) and bool(page)
    return Extent(truncated=cut or not flags & 4, joined=joined)


_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by version
_KBITS = {  # of layer III, for MPEG 1 and for the others
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mp3(file: BinaryIO, size: int) -> Extent:
    """Without a tag that counts the frames, libsndfile guesses the length from the size: they are counted here."""
    file.seek(0)
    first = file.read(_LONGEST_FRAME)
    first = first[: _frame_size(first[:4])]
    if size > _LARGEST_MP3 or not first:
        return Extent()
    count, at = 0, 0
    while at + 4 <= size:
        file.seek(at)
        head = file.read(10)
        if between := 128 if head[:3] == b"TAG" else _tag_size(head):
            at += between
            continue
        length = _frame_size(head)
        if length == 0:
            break  # other tags, as a rule
        if at + length > size:
            return Extent(truncated=True)
        count, at = count + 1, at + length
    tagged, told = _frames_told(first)
    if told is not None:
        # Its own frame is not counted by most; what follows may be a padded last one.
        return Extent(joined=count > told + 2, truncated=count < told)
    if tagged:
        return Extent()
    # A tag in front, as encoders write it: a silent frame of the same kind that holds the number of frames.
    # It stands behind the side information, whose length goes by version (MPEG 1 or not) and channels.
    is_first, mono = first[1] >> 3 & 3 == 3, first[3] >> 6 == 3
    side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[is_first, mono]
    header = bytes([first[0], first[1] | 1, 0x90 | first[2] & 0x0C, first[3]])
    made = header + bytes(side) + b"Info" + struct.pack(">II", 1, count)
    return Extent(unknown=True, prefix=made.ljust(_frame_size(header), b"\0"))


def _frames_told(frame: bytes) -> tuple[bool, int | None]:
    """Whether the first frame is a tag about the others, and the number of frames that it tells, if it does."""
    for name, place in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        tag = frame.find(name)
        if tag >= 0 and tag + place + 4 <= len(frame):
            told = name == b"VBRI" or bool(frame[tag + 7] & 1)  # the others' flags say what they hold
            return True, int.from_bytes(frame[tag + place : tag + place + 4], "big") if told else None
    return False, None


def _frame_size(header: bytes) -> int:
    """Bytes of the frame of layer III that begins so; 0 where none does."""
    # Eleven bits of ones, two of the version, then two that are 01 for layer III.
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, kbits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or kbits in (0, 15) or rate == 3:
        return 0
    per_frame = 144_000 if version == 3 else 72_000
    return per_frame * _KBITS[version == 3][kbits] // _RATES[version][rate] + (header[2] >> 1 & 1)
