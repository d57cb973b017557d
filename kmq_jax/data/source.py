"""Opening any DATA argument: one table of utterances, whatever the form on disk."""

import os
from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.outputs import check_no_bucket
from kmq_jax.data.audio import SAMPLE_RATE, AudioError, read_audio, to_mono_16k
from kmq_jax.data.corpora import cnceleb_eval_below, is_cnceleb_eval, open_cnceleb_eval
from kmq_jax.data.folder import open_csv, open_folder
from kmq_jax.data.kaldi import open_kaldi
from kmq_jax.data.table import Utterances, concatenate
from kmq_jax.data.voxceleb import open_voxceleb, tree_root

__all__ = [
    "SAMPLE_RATE",
    "AudioError",
    "Utterances",
    "open_source",
    "open_sources",
    "read_audio",
    "require_data",
    "to_mono_16k",
]


def open_source(data: str | os.PathLike[str], speakers: bool = True) -> Utterances:
    """Opens a DATA argument.

    Args:
        data: a Kaldi data directory (`wav.scp`, `utt2spk`), a VoxCeleb tree (`id*/video/utt.wav|m4a|flac`), CN-Celeb's
            `CN-Celeb_flac/eval`, any folder of `speaker/**/audio`, a CSV with `path,speaker`, a dataset made by
            `prepare_data` (or by tfds), or `synthetic:SPLIT[?key=value]` for the embedded corpus.
        speakers: whether it matters who speaks: not of noise.

    Returns:
        The utterances; nothing is decoded yet.

    Raises:
        UserError: there is no such data, or a list in it is wrong; the message names the file and line.

    >>> table = open_source("synthetic:dev?speakers=2&utterances=3")
    >>> len(table), table.ids[0]
    (6, 'syn-dev-0000-00')
    """
    text = os.fspath(data)
    if text.startswith("synthetic:"):
        from kmq_jax.data.synthetic import open_synthetic

        return open_synthetic(text)
    _require(text)
    path = Path(text)
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return open_csv(path)
        raise UserError(f"{text} is a file; data is a directory, or a CSV whose name ends in .csv")
    if (path / "dataset_info.json").is_file():
        from kmq_jax.data.prepared import open_prepared  # tfds is slow to import

        return open_prepared(path)
    if (path / ".prepare").is_dir():
        raise UserError(
            f"{text} is an unfinished prepare_data output; run the same prepare_data command again to finish it"
        )
    if (path / "wav.scp").is_file():
        return open_kaldi(path)
    if is_cnceleb_eval(path.absolute()):  # whose name is looked at
        return open_cnceleb_eval(path.absolute())
    if inside := cnceleb_eval_below(path):
        raise UserError(
            f"{text} holds all of CN-Celeb: give {inside} to evaluate (its trials: {inside}/lists/trials.lst, its "
            f"enrolment models: {inside}/lists/enroll.map), or {inside.parent / 'data'} to train"
        )
    return open_voxceleb(path) if tree_root(path) else open_folder(path, speakers)


def open_sources(data: str, speakers: bool = True) -> Utterances:
    """Opens several DATA arguments, separated by commas, as one table.

    Speakers of the same name in two of them are taken for different people.

    Args:
        data: DATA, or several.
        speakers: as in `open_source`.

    Raises:
        UserError: as `open_source`.

    >>> len(open_sources("synthetic:dev?speakers=2&utterances=3,synthetic:test?speakers=2&utterances=3"))
    12
    """
    return concatenate([open_source(part, speakers) for part in _parts(data)])


def require_data(data: str) -> None:
    """Refuses DATA, or one of several, that is not there. Nothing of it is read: a step hours later will.

    Raises:
        UserError: there is no such file or directory.

    >>> require_data("synthetic:dev,.")
    """
    for part in _parts(data):
        if not part.startswith("synthetic:"):
            _require(part)


def _parts(data: str) -> list[str]:
    return [part.strip() for part in data.split(",") if part.strip()] or [data]


def _require(text: str) -> None:
    if not text.strip():  # as a path it would be the current directory
        raise UserError(f"DATA (={text!r}) is empty")
    check_no_bucket("DATA", text)
    try:
        Path(text).stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = reason_of(error).lower()
        raise UserError(f"no data at {text}: {reason}") from None
