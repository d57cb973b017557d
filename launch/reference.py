#!/usr/bin/env python3
"""How near a model's embeddings come to those that its original code gave for the same recordings.

    kmq-jax import_model --source=3dspeaker-campplus-zh-en.pt --out=runs/campplus
    launch/reference.py --model=runs/campplus --reference=campplus-reference.npz --data=DIR --json=reference.json

The reference is a NumPy file with pairs of arrays: for the recordings of DIR/words/dev `words_dev_ids` and `words_dev`,
one embedding a row. Cosines are of each recording, whole and alone; the least and the mean of each set are printed.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from kmq_jax.benchmarks.extract import cosines
from kmq_jax.data import source
from kmq_jax.models.speaker_model import SpeakerModel, embed_waves, load_model


def compare(model: SpeakerModel, wanted: dict[str, np.ndarray], root: Path, engine: str) -> list[dict]:
    """For each set of the reference its recordings, and the least and mean cosine to them."""
    rows = []
    for key in sorted(name for name in wanted if f"{name}_ids" in wanted):
        place = key.replace("_", "/", 1)
        table = source.open_source(str(root / place))
        at = {name: row for row, name in enumerate(table.ids)}
        made = [embed_waves(model, [table.load(at[str(name)])], engine=engine)[0] for name in wanted[f"{key}_ids"]]
        found = cosines(np.stack(made), wanted[key])
        rows.append({"set": place, "recordings": len(found), "least": float(found.min()), "mean": float(found.mean())})
    return rows


def main() -> None:
    """Prints the cosines and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("model", "reference", "data"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--engine", default="auto", choices=("auto", "jax", "onnxruntime"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with np.load(given.reference, allow_pickle=False) as file:
        wanted = {name: file[name] for name in file.files}
    sets = compare(load_model(given.model), wanted, Path(given.data), given.engine)
    for row in sets:
        print(f"{row['set']}: {row['recordings']} recordings, least cosine {row['least']:.7f}, mean {row['mean']:.7f}")
    if given.json:
        found = {"kind": "beside_original", "engine": given.engine, "sets": sets}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
