"""Public corpora, laid out as DATA with trial lists: speechocean762, VoxCeleb1, VoxCeleb2.

speechocean762 (OpenSLR 101, CC BY 4.0) is downloaded. VoxCeleb's recordings are given to those who ask
(https://www.robots.ox.ac.uk/~vgg/data/voxceleb/): the user brings its archives, which are checked by the published
hashes; lists and genders are downloaded. File names within an archive are not trusted: it is unpacked into a directory
of its own.
"""

import contextlib
import dataclasses
import gzip
import io
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kmq_jax.core.download import check_md5, download
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.locks import sole_writer
from kmq_jax.core.progress import Bar
from kmq_jax.data.audio import SAMPLE_RATE, num_samples
from kmq_jax.data.draw import draw_trials, write_trials
from kmq_jax.data.kaldi import open_kaldi, read_table
from kmq_jax.data.table import Utterances
from kmq_jax.data.voxceleb import open_voxceleb

_SLR, _VOX = "https://www.openslr.org/resources", "https://www.robots.ox.ac.uk/~vgg/data/voxceleb"
_ASK = f"ask for it at {_VOX}/ (or give a --mirror that has it)"
_UNPACKING = ".unpacking-"
# Of an archive that is damaged, has a password, or was packed in a way that Python does not know.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)

_DEV = (
    "0024 0044 0093 0096 0114 0133 0157 0457 0461 0567 0811 0981 1037 1039 1046 1061 1075 1099 1135 1181 "
    "1228 1293 1404 1408 1465 1501 2016 2027 2031 2116 2355 2438 2448 2892 2917 3007 3014 3027 3214 3631 "
    "5029 5039 5220 5428 6067 6099 8068 8581 9088 9107 9118 9555 9601 9608 9612 9618 9626 9629 9635 9647"
)
SO762_DEV = tuple(_DEV.split())
"""Speakers of speechocean762 that the figures of this project are of; all others may be trained on."""
SO762_SECONDS, SO762_LEAST = 2.4, 20
"""Shorter utterances are left out, and then speakers of fewer utterances."""
SO762_TRIALS = {"targets": 6000, "nontargets": 24000, "matched": 0.5}
"""Half of the nontargets share gender and group of ages."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of a release.

    Attributes:
        name: what it is called.
        md5: as published; empty where none is.
        address: of the web directory that it is downloaded from; empty where it must be asked for.
    """

    name: str
    md5: str = ""
    address: str = ""


@dataclasses.dataclass(frozen=True)
class Release:
    """What a corpus is made of, and what it becomes.

    Attributes:
        archives: parts of one archive each: a `.tar.gz`, or a zip that may be cut into parts.
        unpacked: the directory that each archive holds.
        beside: further files, such as trial lists.
        finish: writes what is still missing into the directory, and returns lines about what it holds.
    """

    archives: tuple[tuple[Source, ...], ...]
    unpacked: tuple[str, ...]
    beside: tuple[Source, ...]
    finish: Callable[[Path], list[str]]


def _parts(stem: str, hashes: Sequence[str]) -> tuple[Source, ...]:
    return tuple(Source(f"{stem}_parta{letter}", md5) for letter, md5 in zip("abcdefgh", hashes))


def lay_out(release: Release, out: Path, archives: Path, mirror: str = "") -> list[str]:
    """Fetches what is missing of a corpus, checks and unpacks it, and writes its lists.

    What was unpacked before is taken as it is, so that the same call goes on after an interruption. Its archives need
    not lie there any more.

    Args:
        release: one of `RELEASES`.
        out: the directory that the corpus is laid out in.
        archives: where its files lie, and are downloaded to.
        mirror: http(s):// address of a directory that holds all of them, in place of where they are published.

    Returns:
        Lines about what there is now.

    Raises:
        UserError: a file is missing and cannot be downloaded, is damaged, or holds something else.
    """
    with sole_writer(out, "out"):
        for left in out.glob(f"{_UNPACKING}*"):
            shutil.rmtree(left)
        for parts, inside in zip(release.archives, release.unpacked):
            if not (_marker(out, parts[0].name).is_file() and (out / inside).is_dir()):
                _unpack([_fetched(part, archives, mirror) for part in parts], out, inside)
        for one in release.beside:
            if not (out / one.name).is_file():
                found = _fetched(one, archives, mirror)
                with atomic_write(out / one.name) as temporary:
                    shutil.copyfile(found, temporary)
        return release.finish(out)


def _fetched(one: Source, archives: Path, mirror: str) -> Path:
    """A file of the release: one that lies there, or a download."""
    place, base = archives / one.name, mirror or one.address
    if place.is_file():
        check_md5(place, one.md5)
        return place
    if not base:
        raise UserError(f"--archives: {place} is missing: {_ASK}")
    return download(f"{base.rstrip('/')}/{one.name}", place, one.md5)


def _marker(out: Path, archive: str) -> Path:
    """What says that an archive is unpacked: each has its own, for two may share a directory."""
    return out / f".{archive}.unpacked"


def _unpack(parts: Sequence[Path], out: Path, inside: str) -> None:
    """Unpacks one archive, which holds a directory `inside`; its marker is made when all of it is there."""
    place = Path(tempfile.mkdtemp(prefix=_UNPACKING, dir=out))
    try:
        extract = _extract_tar if parts[0].name.endswith(".tar.gz") else _extract_zip
        extract(parts, place)
        if not (place / inside).is_dir():
            raise UserError(f"{parts[0]} holds no directory {inside}")
        _merge(place / inside, out / inside)
        _marker(out, parts[0].name).touch()
    except _BROKEN as error:
        raise UserError(f"cannot unpack {parts[0]}: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _merge(source: Path, target: Path) -> None:
    """Moves what lies in a directory into another; a speaker's directory moves as a whole."""
    target.mkdir(parents=True, exist_ok=True)
    for one in sorted(source.iterdir()):
        there = target / one.name
        if there.is_dir() and not there.is_symlink():
            shutil.rmtree(there)  # of an unpacking that was interrupted
        one.rename(there)


def _extract_tar(parts: Sequence[Path], place: Path) -> None:
    (archive,) = parts
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as opened:
            opened.extractall(place, filter="data")  # no links out, no devices, no absolute names
        while stream.read(1 << 20):  # to the end, where the checksum stands
            pass


def _extract_zip(parts: Sequence[Path], place: Path) -> None:
    with _joined(parts) as file, zipfile.ZipFile(file) as opened:
        members = opened.infolist()
        bar = Bar(len(members), f"unpacking {parts[0].name}", "file")
        for done, member in enumerate(members, 1):
            opened.extract(member, place)  # leaves `..` and leading slashes out of names
            bar.show(done)
        bar.close()


@contextlib.contextmanager
def _joined(parts: Sequence[Path]) -> Iterator[io.BufferedReader]:
    """Parts of a file as one file, without a copy."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        yield io.BufferedReader(Joined(files))


class Joined(io.RawIOBase):
    """Files, one behind the other, as one that is read.

    >>> joined = Joined([io.BytesIO(b"abc"), io.BytesIO(b"de")])
    >>> joined.seek(2), io.BufferedReader(joined).read()
    (2, b'cde')
    """

    def __init__(self, files: Sequence[io.IOBase]):
        """Takes files that can be sought in."""
        self._files = [(file, file.seek(0, io.SEEK_END)) for file in files]
        self._length = sum(length for _, length in self._files)
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; returns the new place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Reads as much as one file still has; returns how much."""
        at = self._at
        for file, length in self._files:
            if at < length:
                file.seek(at)
                data: bytes = file.read(min(len(buffer), length - at))  # type: ignore[attr-defined]
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            at -= length
        return 0


def finish_so762(out: Path) -> list[str]:
    """Writes `train` and `dev`, Kaldi data directories with speakers of their own, and `dev/trials.txt`."""
    corpus = out / "speechocean762"
    found: dict[str, dict[str, str]] = {name: {} for name in ("wav.scp", "utt2spk", "spk2gender", "spk2age")}
    for part in ("train", "test"):  # the release's own halves, made for scoring pronunciation
        for name, table in found.items():
            table |= read_table(corpus / part / name)[0]
    usable: dict[str, list[str]] = {}
    for utterance, place in sorted(found["wav.scp"].items()):
        if num_samples(corpus / place) >= SO762_SECONDS * SAMPLE_RATE:
            usable.setdefault(found["utt2spk"][utterance].zfill(4), []).append(utterance)
    usable = {speaker: names for speaker, names in usable.items() if len(names) >= SO762_LEAST}
    told = []
    for name, chosen in {"dev": usable.keys() & set(SO762_DEV), "train": usable.keys() - set(SO762_DEV)}.items():
        if len(chosen) < 2:
            raise UserError(f"{corpus} holds fewer than two speakers for {name}")
        _write_kaldi(out / name, {speaker: usable[speaker] for speaker in sorted(chosen)}, found)
        told.append(_told(name, open_kaldi(out / name)))  # opened as a user would, which checks it
    dev = open_kaldi(out / "dev")
    trials = draw_trials(dev, **SO762_TRIALS)  # type: ignore[arg-type]
    write_trials(out / "dev" / "trials.txt", trials)
    return [*told, f"dev/trials.txt: {len(trials):,} trials, {int(trials.label.sum()):,} of them targets"]


def _write_kaldi(place: Path, speakers: dict[str, list[str]], found: dict[str, dict[str, str]]) -> None:
    """A Kaldi data directory of some speakers; ids begin with the speaker, as Kaldi wants them."""
    known = {name: {key.zfill(4): value for key, value in found[name].items()} for name in ("spk2gender", "spk2age")}
    rows: dict[str, list[str]] = {name: [] for name in found}
    for speaker, utterances in speakers.items():
        for name, of_speaker in known.items():
            if speaker in of_speaker:
                rows[name].append(f"so762_{speaker} {of_speaker[speaker]}\n")
        for utterance in utterances:
            own = f"so762_{speaker}-{utterance}"
            rows["wav.scp"].append(f"{own} ../speechocean762/{found['wav.scp'][utterance]}\n")
            rows["utt2spk"].append(f"{own} so762_{speaker}\n")
    for name, lines in rows.items():
        with atomic_write(place / name) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def finish_voxceleb(out: Path) -> list[str]:
    """Tells what a VoxCeleb tree holds."""
    table = open_voxceleb(out)
    return [_told(str(out), table), *(f"{one.name}: trial list" for one in sorted(out.glob("*_test*.txt")))]


def _told(name: str, table: Utterances) -> str:
    return f"{name}: {len(table):,} utterances of {len(table.speaker_names):,} speakers"


RELEASES = {
    "speechocean762": Release(
        archives=((Source("speechocean762.tar.gz", address=f"{_SLR}/101"),),),
        unpacked=("speechocean762",),
        beside=(),
        finish=finish_so762,
    ),
    "voxceleb1": Release(
        archives=(
            (Source("vox1_test_wav.zip", "185fdc63c3c739954633d50379a3d102"),),
            _parts(
                "vox1_dev_wav",
                (
                    "e395d020928bc15670b570a21695ed96",
                    "bbfaaccefab65d82b21903e81a8a8020",
                    "017d579a2a96a077f40042ec33e51512",
                    "7bb1e9f70fddc7a678fa998ea8b3ba19",
                ),
            ),
        ),
        unpacked=("wav", "wav"),
        beside=(
            Source("veri_test2.txt", "b73110731c9223c1461fe49cb48dddfc", f"{_VOX}/meta"),
            Source("list_test_all2.txt", "a53e059deb562ffcfc092bf5d90d9f3a", f"{_VOX}/meta"),
            Source("list_test_hard2.txt", "857790e09d579a68eb2e339a090343c8", f"{_VOX}/meta"),
            Source("vox1_meta.csv", "f5067cae5157ca27904c4b0a926e2661", f"{_SLR}/49"),
        ),
        finish=finish_voxceleb,
    ),
    "voxceleb2": Release(
        archives=(
            _parts(
                "vox2_dev_aac",
                (
                    "da070494c573e5c0564b1d11c3b20577",
                    "17fe6dab2b32b48abaf1676429cdd06f",
                    "1de58e086c5edf63625af1cb6d831528",
                    "5a043eb03e15c5a918ee6a52aad477f9",
                    "cea401b624983e2d0b2a87fb5d59aa60",
                    "fc886d9ba90ab88e7880ee98effd6ae9",
                    "d160ecc3f6ee3eed54d55349531cb42e",
                    "6b84a81b9af72a9d9eecbb3b1f602e65",
                ),
            ),
        ),
        unpacked=("dev/aac",),
        beside=(Source("vox2_meta.csv", address=f"{_SLR}/49"),),
        finish=finish_voxceleb,
    ),
}
"""The corpora by name. Hashes are those that VoxCeleb publishes of its parts and lists; OpenSLR publishes none."""
