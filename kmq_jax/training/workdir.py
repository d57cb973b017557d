"""The files of a run's directory that say which run it is and what it was computed with."""

from pathlib import Path

import jax

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_json, read_object, write_json
from kmq_jax.core.provenance import provenance

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


def record_start(settings: Settings, workdir: Path, step: int) -> None:
    """Writes `config.json`, and adds to `starts.json` what the run is computed with from `step` on.

    To be called once a step has run, so that a mistake in the settings leaves nothing to be undone.
    """
    if jax.process_index() == 0:
        write_json(workdir / "config.json", settings)
        path = workdir / "starts.json"
        before = read_json(path) if path.exists() else []
        write_json(path, [*(before if isinstance(before, list) else ()), {"step": step, **provenance()}])


def _flat(tree: Settings, prefix: str = "") -> Settings:
    """Nested settings as one level, keys joined by dots.

    >>> _flat({"loss": {"margin": 0.2}, "seed": 0})
    {'loss.margin': 0.2, 'seed': 0}
    """
    flat: Settings = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
