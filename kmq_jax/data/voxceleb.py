"""VoxCeleb trees: `id10270/x6uYqmx31kE/00001.wav` (or .m4a, .flac)."""

import os
import re
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import say_once
from kmq_jax.data.folder import audio_files
from kmq_jax.data.table import Utterances

_SPEAKER = re.compile(r"id\d{5}$")
_UTTERANCE = re.compile(r"id\d{5}/[^/]+/[^/]+$")
_INNER = ("", "wav", "aac", "dev/wav", "dev/aac", "test/wav", "test/aac")  # where the official archives put the tree


def tree_root(root: Path) -> Path | None:
    """Returns the directory that holds the speakers: `root` or, as in the official archives, `wav` or `aac` below it.

    None where this is no VoxCeleb tree.

    Raises:
        UserError: there are several: taking one would leave the others out.
    """
    found: dict[str, Path] = {}  # by where they really are: one may be a link to another
    for inner in _INNER:
        place = root / inner
        if not place.is_dir():
            continue
        speakers = sorted(name for name in os.listdir(place) if _SPEAKER.match(name) and (place / name).is_dir())
        # The video level tells VoxCeleb from CN-Celeb, whose speakers are also called id00000.
        if speakers and any(entry.is_dir() for entry in list((place / speakers[0]).iterdir())):
            found.setdefault(os.path.realpath(place), place)
    places = list(found.values())
    if len(places) > 1:
        listed = " and ".join(map(str, places))
        raise UserError(f"{root} holds several VoxCeleb trees: name one of {listed}, or both separated by a comma")
    return places[0] if places else None


def open_voxceleb(root: Path) -> Utterances:
    """Opens a VoxCeleb tree.

    The id of an utterance is its path as the official trial lists write it, with the suffix `.wav` even where the
    release (VoxCeleb2) or the user's own conversion has another one. Genders come from `vox1_meta.csv` or
    `vox2_meta.csv`, found beside the tree. Recordings that lie otherwise are left out, and counted on standard error.

    Raises:
        UserError: no VoxCeleb tree, or the same utterance in two formats.
    """
    place = tree_root(root)
    found = tuple(audio_files(place)) if place else ()
    paths = tuple(path for path in found if _UTTERANCE.match(path))
    if place is None or not paths:
        raise UserError(f"{root} is no VoxCeleb tree (id*/video/utterance.wav)")
    if len(paths) < len(found):
        first = next(path for path in found if not _UTTERANCE.match(path))
        say_once(f"{place}: {len(found) - len(paths)} recordings are left out: not id*/video/utterance, as {first}")
    ids = tuple(path.rpartition(".")[0] + ".wav" for path in paths)
    seen: dict[str, str] = {}
    for path, name in zip(paths, ids):
        if name in seen:
            raise UserError(f"{place}: {name.removesuffix('.wav')} is there twice, as {seen[name]} and {path}")
        seen[name] = path
    genders: dict[str, str] = {}
    # Archives are unpacked at different depths: the metadata lies beside the tree or above it.
    for folder in dict.fromkeys((root, place, place.parent, root.parent)):
        for meta in ("vox1_meta.csv", "vox2_meta.csv"):
            if (folder / meta).is_file():
                genders |= _read_genders(folder / meta)
    return Utterances(
        ids=ids, paths=paths, speakers=tuple(path.split("/", 1)[0] for path in paths), root=place, genders=genders
    )


def _read_genders(path: Path) -> dict[str, str]:
    """Reads the official metadata: tabs in VoxCeleb1, commas in VoxCeleb2; gender is the third column."""
    genders = {}
    for line in path.read_text(errors="replace").splitlines():
        fields = [field.strip() for field in re.split(r"[\t,]", line)]
        if len(fields) > 2 and _SPEAKER.match(fields[0]) and fields[2] in ("m", "f"):
            genders[fields[0]] = fields[2]
    return genders
