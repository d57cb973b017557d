"""The files of a run's directory that say which run it is and what it was computed with."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_json, read_object, write_json
from kmq_jax.core.provenance import provenance
from kmq_jax.data.table import Utterances

INPUTS = "inputs.json"
"""The file of a run's directory that says what its settings named when it began: see `inputs_of`."""

Settings = Json
"""A configuration as JSON values, as `config.json` holds it."""

# What may differ when a run is taken up again: it changes what is seen of the run, not the run.
_MAY_CHANGE = (
    "log_every",
    "checkpoint_epochs",
    "keep_checkpoints",
    "average_last",
    "validation",
    "data.threads",
    "data.ahead",
    "remat_keeps",
)
# Of these, what the end of a run depends on.
_FINISH = ("average_last", "validation.data", "validation.trials")


def settings_of(config: ml_collections.ConfigDict) -> Settings:
    """The settings that a training run depends on, as JSON values: all but the section `study`."""
    return {key: value for key, value in json.loads(config.to_json()).items() if key != "study"}


def check_same_run(settings: Settings, workdir: Path) -> None:
    """Checks that the run which `config.json` describes, if there is one, is the same.

    Raises:
        UserError: the workdir holds a run with other settings; the message names the first that differs.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    before, after = _flat(read_object(path)), _flat(settings)
    for key in sorted(before.keys() | after.keys()):
        # By prefix: a section's name stands for all of its keys.
        if before.get(key) != after.get(key) and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"--workdir={workdir} holds a run with {key}={before.get(key)!r}, not {after.get(key)!r}: "
                "use another directory"
            )


def inputs_of(utterances: Utterances) -> Json:
    """What `data.train` holds, so that it is told from other data at the same place.

    The numbers of `utterances` and `speakers`, and hashes of the former's ids, parts and speakers, and of the latter's
    names. Recordings themselves are not read.

    >>> from kmq_jax.data.source import open_source
    >>> known = inputs_of(open_source("synthetic:dev?speakers=4&utterances=2"))
    >>> list(known), known["speakers"]
    (['utterances', 'speakers', 'utterances_hash', 'speakers_hash'], 4)
    """
    parts = [] if utterances.spans is None else [f"{first} {last}" for first, last in utterances.spans.tolist()]
    return {
        "utterances": len(utterances),
        "speakers": len(utterances.speaker_names),
        "utterances_hash": _hash((*utterances.ids, "", *utterances.speakers, "", *parts)),
        "speakers_hash": _hash(utterances.speaker_names),
    }


def _hash(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:20]


def check_same_inputs(inputs: Json, workdir: Path) -> None:
    """Checks that the places which the settings name hold what they held when the run began.

    Speakers are numbered by their names, and an epoch is as long as the data: others would go by unnoticed.

    Args:
        inputs: as they are now, `inputs_of` and perhaps the fingerprint of the `teacher`.
        workdir: the run's directory. Where it does not tell, as that of a new run, all is well.

    Raises:
        UserError: something else is there now.
    """
    path = workdir / INPUTS
    before = read_object(path) if path.exists() else {}
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if not changed:
        return
    if changed == ["teacher"]:
        what = "another teacher than distill.teacher or init_from hold now"
    else:
        had, has = (f"{one.get('utterances')} utterances of {one.get('speakers')} speakers" for one in (before, inputs))
        what = f"{had} in data.train, which now has {has if had != has else 'others'}"
    raise UserError(f"--workdir={workdir} holds a run with {what}: use another directory")


def record_start(settings: Settings, workdir: Path, step: int, inputs: Json) -> None:
    """Writes `config.json` and `inputs.json`, and adds to `starts.json` what the run is computed with from `step` on.

    To be called once a step has run, so that a mistake in the settings leaves nothing to be undone.
    """
    if jax.process_index() == 0:
        write_json(workdir / INPUTS, inputs)
        write_json(workdir / "config.json", settings)
        path = workdir / "starts.json"
        before = read_json(path) if path.exists() else []
        write_json(path, [*(before if isinstance(before, list) else ()), {"step": step, **provenance()}])


def finishes_alike(settings: Settings, workdir: Path) -> bool:
    """Whether the run in `workdir` was finished by these settings: of those that may change, what follows the steps."""
    path = workdir / "config.json"
    if not path.exists():
        return True
    before, after = _flat(read_object(path)), _flat(settings)
    return all(before.get(name) == after.get(name) for name in _FINISH)


def _flat(tree: Settings, prefix: str = "") -> Settings:
    """Nested settings as one level, keys joined by dots.

    >>> _flat({"loss": {"margin": 0.2}, "seed": 0})
    {'loss.margin': 0.2, 'seed': 0}
    """
    flat: Settings = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
