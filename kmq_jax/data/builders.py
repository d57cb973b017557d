"""tfds builders of the public corpora, in array_record, without TensorFlow.

    tfds.builder_cls("kmq_vox_celeb1")        # after importing this module; or directly:
    builder = builders.KmqVoxCeleb1(data_dir="data")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir="voxceleb1"))

Every builder reads an unpacked release from `manual_dir`; the layouts are those of `data.corpora`. What it writes opens
as DATA everywhere. So do the outputs of `prepare_data`, which is faster: it works in parallel and resumes.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.data import audio, corpora, prepared
from kmq_jax.data.table import Utterances

log = logging.getLogger(__name__)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders share: one corpus, its splits, one record an utterance."""

    VERSION = tfds.core.Version("1.0.0")
    corpus: ClassVar[str]
    # Nothing is downloaded; looking for a list of downloads, tfds would import a package it does not install.
    url_infos: ClassVar[Json] = {}

    def __init__(self, **settings: object):
        super().__init__(**{"file_format": "array_record", **settings})

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802 (tfds's name)
        """Says what to put into `manual_dir`."""
        return (corpora.CORPORA[self.corpus].__doc__ or "").strip()

    def _info(self) -> tfds.core.DatasetInfo:
        # In order, so that the listing written beside the records names them.
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=prepared.features(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        splits = corpora.CORPORA[self.corpus](Path(dl_manager.manual_dir)).splits
        return {name: self._generate_examples(name, table) for name, table in splits.items()}

    def _generate_examples(self, split: str, table: Utterances) -> Iterator[tuple[int, Json]]:
        rows = []
        for i in range(len(table)):
            try:
                wave = audio.to_int16(table.load(i))
            except audio.AudioError as error:
                log.warning("left out: %s", error)
                continue
            row = {"id": table.ids[i], "path": table.paths[i], "speaker": table.speakers[i]}
            known = {"gender": table.genders.get(row["speaker"], ""), "age": table.ages.get(row["speaker"], "")}
            rows.append({**row, **known, "samples": len(wave)})
            yield i, {"audio": wave, **row}
        if not rows:
            raise UserError(f"{self.name}: no recording of {split} can be used")
        prepared.write_listing(Path(self.data_dir) / f"utterances-{split}.csv", rows)


class KmqVoxCeleb1(_Builder):
    """VoxCeleb1 (Nagrani, Chung, Zisserman 2017): 1,251 speakers, 153,516 utterances of interviews."""

    corpus = "voxceleb1"


class KmqVoxCeleb2(_Builder):
    """VoxCeleb2 (Chung, Nagrani, Zisserman 2018): 5,994 + 118 speakers, 1,128,246 utterances of interviews."""

    corpus = "voxceleb2"


class KmqCnCeleb(_Builder):
    """CN-Celeb 1 and 2 (Fan et al. 2020, Li et al. 2022): Chinese speakers in eleven genres."""

    corpus = "cnceleb"


class KmqVoxTube(_Builder):
    """VoxTube (Yakovlev et al. 2023): 5,040 speakers of many languages, four-second segments."""

    corpus = "voxtube"


class KmqCommonBench(_Builder):
    """CommonBench: an out-of-domain set of speaker verification trials."""

    corpus = "commonbench"


class KmqKaldi(_Builder):
    """A Kaldi data directory."""

    corpus = "kaldi"
