"""The public corpora of the field as they lie on disk once unpacked, with their official trial lists.

Each function takes the directory that holds the unpacked release and returns its splits and lists. Nothing is
downloaded: the corpora need a registration.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.data.folder import audio_files, open_folder
from kmq_jax.data.kaldi import numbered_lines, open_kaldi
from kmq_jax.data.table import Utterances, concatenate
from kmq_jax.data.trials import Trials, read_models, read_trials
from kmq_jax.data.voxceleb import open_voxceleb, tree_root


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An unpacked release.

    Attributes:
        splits: utterances by split.
        lists: the file of each official trial list that is there, by the list's usual name.
        models: the utterances of each enrolment model, where the lists enrol models.
    """

    splits: Mapping[str, Utterances]
    lists: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    models: Mapping[str, list[str]] | None = None

    @property
    def utterances(self) -> Utterances:
        """All splits in one table. Trials are indices into it: a list may compare utterances of several splits."""
        return concatenate(list(self.splits.values()), same_speakers=True)

    def trials(self, name: str) -> Trials:
        """Reads an official trial list, as indices into `utterances`.

        Raises:
            UserError: there is no such list, or it names an unknown utterance.
        """
        if name not in self.lists:
            raise UserError(f"no trial list {name!r} here; found: {', '.join(self.lists) or 'none'}")
        table = self.utterances
        return read_trials(self.lists[name], table.ids, table.paths, self.models)


def voxceleb1(root: Path) -> Corpus:
    """VoxCeleb1: `vox1_dev_wav/` and `vox1_test_wav/` (each with `wav/id*/video/*.wav`), or both in one tree.

    Lists, where present in `root`: `O` (`veri_test2.txt`, cleaned), `E` (`list_test_all2.txt`), `H`
    (`list_test_hard2.txt`), and the uncleaned originals under `O-original`, `E-original`, `H-original`.
    """
    names = {
        "O": "veri_test2.txt",
        "E": "list_test_all2.txt",
        "H": "list_test_hard2.txt",
        "O-original": "veri_test.txt",
        "E-original": "list_test_all.txt",
        "H-original": "list_test_hard.txt",
    }
    places = {"dev": ("vox1_dev_wav", "dev"), "test": ("vox1_test_wav", "test")}
    return Corpus(_voxceleb_splits(root, places), _present(root, names))


def voxceleb2(root: Path) -> Corpus:
    """VoxCeleb2: `dev/aac/id*/video/*.m4a` and `test/aac/...` or `aac/...` for the test part."""
    places = {"dev": ("vox2_dev_aac", "dev"), "test": ("vox2_test_aac", "test", "aac")}
    return Corpus(_voxceleb_splits(root, places))


def _voxceleb_splits(root: Path, places: Mapping[str, tuple[str, ...]]) -> dict[str, Utterances]:
    splits = {}
    for split, candidates in places.items():
        found = next((root / name for name in candidates if (root / name).is_dir() and tree_root(root / name)), None)
        if found is not None:
            splits[split] = open_voxceleb(found)
    if splits:
        return splits
    return {"train": open_voxceleb(root)}  # both parts unpacked into one tree, as lists E and H expect


def cnceleb(root: Path) -> Corpus:
    """CN-Celeb (OpenSLR 82), `CN-Celeb_flac/` and, where present, `CN-Celeb2_flac/`; or the first of them itself.

    Splits: `dev` (the speakers of `dev/dev.lst`), `train2` (CN-Celeb2), and `eval`: `enroll/*.flac` and `test/*.flac`,
    and the recordings in `data/` that `eval/lists/enroll.map` joins into enrolment models. Lists: `eval`
    (`eval/lists/trials.lst`). Without `enroll.map`, a model is the one joined recording that `enroll.lst` names. Ids
    of `eval` end in `.wav`, as the lists write them, where the release has `.flac`.

    Raises:
        UserError: it is no such release, or a list or a recording is missing.
    """
    first = root / "CN-Celeb_flac" if (root / "CN-Celeb_flac").is_dir() else root
    if not is_cnceleb_eval(first / "eval"):
        raise UserError(f"{root} is no CN-Celeb release (CN-Celeb_flac/data and CN-Celeb_flac/eval/lists)")
    data = open_folder(first / "data")
    splits = {}
    if (first / "dev" / "dev.lst").is_file():
        speakers = {name for _, line in numbered_lines(first / "dev" / "dev.lst") for name in line.split()}
        chosen = [i for i, speaker in enumerate(data.speakers) if speaker in speakers]
        splits["dev"] = data.select(chosen)
    if (root / "CN-Celeb2_flac" / "data").is_dir():
        splits["train2"] = open_folder(root / "CN-Celeb2_flac" / "data")

    splits["eval"] = open_cnceleb_eval(first / "eval")
    lists = first / "eval" / "lists"
    return Corpus(splits, _present(lists, {"eval": "trials.lst"}), _cnceleb_models(lists))


def is_cnceleb_eval(place: Path) -> bool:
    """Whether a directory is the `eval` of a CN-Celeb release: it holds `lists`, and `data` lies beside it."""
    return place.name == "eval" and (place / "lists").is_dir() and (place.parent / "data").is_dir()


def cnceleb_eval_below(place: Path) -> Path | None:
    """The `eval` of a CN-Celeb release that a directory is, or holds one of; None where there is none.

    Raises:
        UserError: the directory cannot be read.
    """
    try:
        below = [place, *sorted(one for one in place.iterdir() if one.name.startswith("CN-Celeb"))]
    except OSError as error:
        raise UserError(f"cannot read {place}: {reason_of(error)}") from error
    return next((one / "eval" for one in below if is_cnceleb_eval(one / "eval")), None)


def open_cnceleb_eval(place: Path) -> Utterances:
    """Opens the evaluation part of CN-Celeb, `CN-Celeb_flac/eval`: all that its trials and enrolment models name.

    These are `enroll/*.flac` and `test/*.flac`, and of `data/` beside it the recordings that models are made of. Trials
    are `lists/trials.lst`, models `lists/enroll.map`. Ids end in `.wav`, as the lists write them.

    Raises:
        UserError: a list or a recording is missing.
    """
    models = _cnceleb_models(place / "lists")
    enrolled = {name for names in models.values() for name in names}
    # Id, path and speaker: first the recordings that models are made of, then those of `eval` itself.
    pieces = [(_as_wav(path), f"data/{path}", path.split("/", 1)[0]) for path in audio_files(place.parent / "data")]
    pieces = [piece for piece in pieces if piece[0] in enrolled]
    for path in audio_files(place):
        if path.startswith(("enroll/", "test/")):
            pieces.append((_as_wav(path), f"eval/{path}", _cnceleb_speaker(path)))
    if not pieces:
        raise UserError(f"{place} holds no audio file")
    ids, paths, speakers = zip(*pieces)
    return Utterances(ids=ids, paths=paths, speakers=speakers, root=place.parent)


def _cnceleb_models(lists: Path) -> dict[str, list[str]]:
    """Recordings by enrolment model; without `enroll.map`, each model's joined recording."""
    whole = lists / "enroll.map"
    models = read_models(whole if whole.is_file() else lists / "enroll.lst")
    return {model: [_as_wav(name) for name in names] for model, names in models.items()}


def _as_wav(name: str) -> str:
    return name.removesuffix(".flac").removesuffix(".wav") + ".wav"


def _cnceleb_speaker(name: str) -> str:
    """`test/id00800-singing-01-002` and `enroll/id00800-enroll` are spoken by id00800."""
    return name.rpartition("/")[2].split("-", 1)[0]


def voxtube(root: Path) -> Corpus:
    """VoxTube (ID R&D): `channel/video/segment_N.wav` (or .mp3); a channel is a speaker.

    Genders come from `language_gender_meta.csv` where it lies in `root`. The release has no official trial list; any
    `*.trials` or `trials*.txt` in `root` is offered under its name.
    """
    table = open_folder(root)
    genders = {}
    meta = root / "language_gender_meta.csv"
    if meta.is_file():
        for _, line in numbered_lines(meta)[1:]:
            fields = [field.strip() for field in line.split(",")]
            if len(fields) > 1 and fields[1][:1] in ("m", "f"):
                genders[fields[0]] = fields[1][:1]
    return Corpus({"train": dataclasses.replace(table, genders=genders)}, _any_lists(root))


def commonbench(root: Path) -> Corpus:
    """CommonBench: a Kaldi data directory, or a tree of `speaker/**/audio`, with trial lists beside it.

    Its release is not described publicly, so this layout is a guess. Every `comparisons*.txt`, `trials`, `trials.*`,
    `trials*.txt` and `*.trials` in `root` is offered, in whichever form `read_trials` knows.
    """
    table = open_kaldi(root) if (root / "wav.scp").is_file() else open_folder(root)
    return Corpus({"train": table}, _any_lists(root))


def kaldi(root: Path) -> Corpus:
    """A Kaldi data directory with its trial lists (`trials`, `trials.*`, `*.trials`)."""
    return Corpus({"train": open_kaldi(root)}, _any_lists(root))


CORPORA: Mapping[str, Callable[[Path], Corpus]] = {
    "voxceleb1": voxceleb1,
    "voxceleb2": voxceleb2,
    "cnceleb": cnceleb,
    "voxtube": voxtube,
    "commonbench": commonbench,
    "kaldi": kaldi,
}


def _present(root: Path, names: Mapping[str, str]) -> dict[str, Path]:
    return {name: root / file for name, file in names.items() if (root / file).is_file()}


def _any_lists(root: Path) -> dict[str, Path]:
    found = [
        path
        for pattern in ("trials", "trials.*", "trials*.txt", "*.trials", "comparisons*.txt")
        for path in sorted(root.glob(pattern))
    ]
    return {path.name: path for path in found if path.is_file()}
