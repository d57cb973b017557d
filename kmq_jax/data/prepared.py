"""Datasets in array_record shards, as `prepare_data` and the builders make them and tfds reads them.

Beside tfds's `dataset_info.json` and `features.json` lies `utterances-SPLIT.csv`, one line a record in their order, so
that a table opens without touching audio. TensorFlow is never needed.
"""

import csv
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

from kmq_jax.core.errors import UserError, needed, reason_of
from kmq_jax.core.files import Row, atomic_write, parse_json, read_json, require_regular, size_and_time
from kmq_jax.data import audio
from kmq_jax.data.table import Utterances, concatenate, require_unique

COLUMNS = ("id", "path", "speaker", "samples", "gender", "age")
_CLASSES = ("pythonClassName", "python_class_name", "type")  # keys under which tfds names the class of a feature


def require_tfds() -> ModuleType:
    """Imports tfds, and what it reads and writes shards by.

    Raises:
        UserError: one of them is not installed.
    """
    needed("array_record.python.array_record_module", "a dataset in shards")  # tfds itself would miss it late
    return needed("tensorflow_datasets", "a dataset in shards")


def features() -> "tfds.features.FeaturesDict":
    """The tfds features of a record: `audio` int16 at 16 kHz, and `id`, `path`, `speaker` as text.

    Audio is stored as bytes: as tfds's default, a list of integers, it would take longer to read and more space.
    """
    tfds = require_tfds()
    text = tfds.features.Text()
    samples = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
    return tfds.features.FeaturesDict({"audio": samples, "id": text, "path": text, "speaker": text})


@functools.cache
def _example() -> Any:
    """The protocol buffer's class for a record."""
    return needed("tensorflow_datasets.proto.tf_example_generated_pb2", "a dataset in shards").Example


def serialize(features: "tfds.features.FeaturesDict", record: Row) -> bytes:
    """Makes the bytes of a record, the same in every process: tfds alone leaves the order of fields to chance."""
    return _example().FromString(features.serialize_example(record)).SerializeToString(deterministic=True)


def write_listing(path: Path, rows: Iterable[Row]) -> None:
    """Writes `utterances-SPLIT.csv`; each row maps `COLUMNS`, of which gender and age may be missing."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def open_prepared(root: Path) -> Utterances:
    """Opens a dataset made by `prepare_data` or by one of the builders; of several splits, all.

    Raises:
        UserError: tfds cannot open it, or it is none of ours.
    """
    tfds = require_tfds()
    for path in sorted(root.iterdir()):  # shards, too, which are opened by C++ much later
        if not path.is_dir():
            require_regular(path)
    for name in ("dataset_info.json", "features.json"):
        if (root / name).exists():
            _check_classes(root / name, read_json(root / name))
    try:
        builder = tfds.builder_from_directory(root)
        counts = {name: split.num_examples for name, split in builder.info.splits.items()}
        ours = {"audio", "id", "speaker"} <= set(builder.info.features)
    except Exception as error:  # tfds raises whatever its parsers do
        raise UserError(f"{root} is no dataset that tfds can read: {type(error).__name__}: {error}") from None
    if not ours or not counts:
        raise UserError(f"{root} is a tfds dataset without the features audio, id and speaker")
    return concatenate([_open_split(root, split, count) for split, count in counts.items()], same_speakers=True)


def _check_classes(file: Path, value: Any) -> None:
    """Refuses features of classes that are not tfds's own: tfds imports whatever module a file names.

    Raises:
        UserError: there is one.
    """
    if isinstance(value, list):
        for one in value:
            _check_classes(file, one)
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        if key in _CLASSES and isinstance(one, str) and "." in one and not one.startswith("tensorflow_datasets."):
            raise UserError(f"{file} names the class {one}, which is none of tfds's own and is not loaded")
        if key == "json" and isinstance(one, str):  # what a feature holds is JSON within JSON
            try:
                one = parse_json(one)
            except ValueError as error:
                raise UserError(f"{file}: a feature's content is not valid JSON: {error}") from error
        _check_classes(file, one)


def _open_split(root: Path, split: str, count: int) -> Utterances:
    listing = root / f"utterances-{split}.csv"
    require_regular(listing)
    try:
        with listing.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {listing}: {reason_of(error)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{listing} is not a CSV in UTF-8: {error}") from None
    if len(rows) != count:
        raise UserError(f"{listing} lists {len(rows)} utterances, but the split has {count} records")
    if rows and set(COLUMNS) - set(rows[0]):
        raise UserError(f"{listing}:1: the columns must be {','.join(COLUMNS)}")
    for line, row in enumerate(rows, 2):
        # DictReader puts surplus fields under None, and None into those that are missing.
        if None in row or None in row.values():
            raise UserError(f"{listing}:{line}: expected {len(COLUMNS)} fields")
    ids = tuple(row["id"] for row in rows)
    require_unique(ids, listing, range(2, len(ids) + 2))  # line 1 is the header
    try:
        samples = np.array([int(row["samples"]) for row in rows], np.int64)
        ages = {row["speaker"]: float(row["age"]) for row in rows if row["age"]}
        if (samples < 0).any():
            raise ValueError(f"an utterance of {np.min(samples)} samples")
    except (ValueError, OverflowError) as error:
        raise UserError(f"{listing}: {error}") from None
    return Utterances(
        ids=ids,
        paths=tuple(row["path"] for row in rows),
        speakers=tuple(row["speaker"] for row in rows),
        root=root,
        samples=samples,
        genders={row["speaker"]: row["gender"] for row in rows if row["gender"]},
        ages=ages,
        reader=_Records(root, split, {name: i for i, name in enumerate(ids)}, samples),
    )


@dataclasses.dataclass(eq=False)
class _Records:
    """Reads the audio of a record by its utterance's id."""

    root: Path
    split: str
    rows: Mapping[str, int]
    samples: np.ndarray

    @cached_property
    def _source(self) -> Any:  # tfds does not say the type
        return require_tfds().builder_from_directory(self.root).as_data_source(split=self.split)

    @cached_property
    def _plain(self) -> bool:
        """Whether audio is stored as `features` has it: the bytes of the samples."""
        return self._source.dataset_info.features["audio"].to_json() == features()["audio"].to_json()

    def __getstate__(self) -> dict[str, object]:
        kept = ("root", "split", "rows", "samples")  # open files stay in their process
        return {name: getattr(self, name) for name in kept}

    def stamps(self) -> list[str]:
        """Of the shards and the listing; see `Utterances.stamps`."""
        files = [*sorted(self.root.glob("*.array_record*")), self.root / f"utterances-{self.split}.csv"]
        return [f"{path.name} {size_and_time(path)}" for path in files]

    def __call__(self, name: str) -> np.ndarray:
        """The recording of that id, float32 `[samples]`."""
        return audio.from_int16(self.int16(name))

    def int16(self, name: str) -> np.ndarray:
        """The recording of that id as it is stored, int16 `[samples]`."""
        try:
            if self._plain:  # several times faster than by way of tfds
                fields = _example().FromString(self._source.data_source[self.rows[name]]).features.feature
                found, stored = fields["id"].bytes_list.value[0], fields["audio"].bytes_list.value[0]
                wave = np.frombuffer(stored, "<i2")
            else:
                record = self._source[self.rows[name]]
                found, wave = record["id"], record["audio"]
        except Exception as error:  # a damaged shard shows as whatever the C++ reader or the parser raises
            raise audio.AudioError(name, f"unreadable ({type(error).__name__}: {error})") from None
        # A listing of another dataset would give one speaker's voice another's name.
        if found != name.encode():
            raise audio.AudioError(name, f"unreadable (its record holds {found.decode(errors='replace')})")
        listed = self.samples[self.rows[name]]
        if len(wave) != listed:
            raise audio.AudioError(name, f"unreadable (its record holds {len(wave)} samples, not {listed} as listed)")
        return wave
