"""`python -m kmq_jax.study`: a network in full precision and at every width, measured on the same trials.

Steps: train (or take) the full-precision network; quantize it without training; train it quantized, at each width and
with nested codebooks; embed the evaluation sets with every one of them; score. A step that is done is not repeated; one
whose settings changed is, with all that depends on it.
"""

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from kmq_jax import kmqat, model, quant, train_loop
from kmq_jax.core import cli
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, read_json, write_json
from kmq_jax.core.memory import keep_freed_memory
from kmq_jax.core.steps import Steps
from kmq_jax.data import source, trials
from kmq_jax.metrics.evaluate import evaluate
from kmq_jax.recalibrate import recalibrate
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.tables import study_table
from kmq_jax.train import parse_flags
from kmq_jax.train_config import quantized

HELP = """usage: python -m kmq_jax.study --config=configs/NAME.py[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains (or takes) a full-precision network, quantizes it with and without training at each width, and measures all of
them on the same trials: DIR/study.json. Run again, it goes on where it stopped and repeats only what has changed.

  --config    a configuration file with a `study` section; `:smoke` after it runs it in seconds
  --config.X  changes one of its settings
  --workdir   directory of all models, embeddings and results

example:
  python -m kmq_jax.study --config=configs/quickstart.py --workdir=runs/study"""

NESTED = "nested"


def study(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what is not done yet.

    Args:
        config: of the full-precision run, with its `study` section.
        workdir: gets models, embeddings, `steps.json` and `study.json`.

    Returns:
        What `study.json` holds: `rows`, one a model, with `model`, `method`, `bits`, `bytes` and the metrics of each
        evaluation set.

    Raises:
        UserError: a setting, file or value is at fault.
    """
    section = config.study
    if not section.evaluate:
        raise UserError("study.evaluate names no evaluation set: (name, DATA, TRIALS)")
    steps = Steps(workdir)

    # 1. Models: (step that makes it, method, width, MODEL, width to read it at).
    if config.init_from:
        reference = Path(config.init_from)
        name = model.fingerprint(model.load(reference))
        steps.run("fp32", name, (), "fp32.json", lambda path: write_json(path, str(reference)))
    else:
        reference = steps.run("fp32", _json(config), (), "fp32", functools.partial(_finish, config))
    rows: list[tuple[str, str, int, Path, int | None]] = [("fp32", "full precision", 32, reference, None)]
    widths = sorted(section.widths, reverse=True)
    runs = [(str(bits), bits, (), "") for bits in widths]
    if section.nested:
        runs.append((NESTED, widths[0], tuple(widths[1:]), ", nested"))
    for name, bits, coarse, suffix in runs:
        own = kmqat_config(config, name, bits, coarse, str(reference))
        rules = [_json(own)["quant"], own.data.train]
        untrained = functools.partial(quantize, own, reference)
        trained = functools.partial(_finish, own)
        made = [
            ("ptq", "without training", steps.run(f"ptq-{name}", rules, ("fp32",), f"ptq-{name}.kmq", untrained)),
            ("kmqat", "trained", steps.run(f"kmqat-{name}", _json(own), ("fp32",), f"kmqat-{name}", trained)),
        ]
        for step, method, path in made:
            for width in (bits, *coarse):
                rows.append((f"{step}-{name}", method + suffix, width, path, width if coarse else None))

    # 2. Embeddings and scores.
    results = []
    for step, method, bits, path, read_at in rows:
        inside = path.relative_to(workdir) if path.is_relative_to(workdir) else path
        result: dict[str, Any] = {"model": str(inside), "method": method, "bits": bits, "sets": {}}
        result["bytes"] = quant.size_bytes(model.load(path).variables).total
        for set_name, data, list_ in section.evaluate:
            about = [data, list_, section.compute, bits]
            name = f"{step}-{bits}-{set_name}"
            embed = _embedder(path, read_at, data, section.compute)
            embedded = steps.run(f"embed-{name}", about, (step,), f"embeddings/{name}.npz", embed)
            measured = steps.run(
                f"score-{name}", about, (f"embed-{name}",), f"metrics/{name}.json", _scorer(embedded, data, list_)
            )
            result["sets"][set_name] = read_json(measured)
        results.append(result)
    summary = {"rows": results}
    write_json(workdir / "study.json", summary)
    return summary


def kmqat_config(
    config: ml_collections.ConfigDict, name: str, bits: int, coarse: tuple[int, ...], reference: str
) -> ml_collections.ConfigDict:
    """The configuration of the quantized run `name`: the full-precision one's, with the `study` section's changes."""
    own = quantized(copy.deepcopy(config), bits, coarse=coarse, rules=config.study.rules)
    own.init_from = reference
    own.average_last = 0
    own.epochs = config.study.epochs[name]
    own.learning_rate.peak = config.study.learning_rate
    own.validation.data = ""
    return own


def quantize(config: ml_collections.ConfigDict, reference: Path, out: Path) -> None:
    """Quantizes a model by the rules of a configuration, without training, and repairs its channels' moments."""
    full = model.load(reference)
    params = quant.quantize(full.variables["params"], kmqat.rules_of(config.quant))
    packed = model.SpeakerModel(full.architecture, full.settings, full.frontend, {**full.variables, "params": params})
    if config.quant.recalibrate:
        packed = recalibrate(full, packed, source.open_sources(config.data.train), config.quant.recalibrate)
    model.save(out, packed)


def _json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a training run depends on."""
    return {key: value for key, value in json.loads(config.to_json()).items() if key != "study"}


def _finish(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if not train_loop.train(config, workdir)["finished"]:
        raise UserError(f"{workdir}: training was stopped; the same command goes on from there")


def _embedder(path: Path, bits: int | None, data: str, compute: str) -> Callable[[Path], None]:
    def embed(out: Path) -> None:
        utterances = source.open_source(data)
        embeddings = model.embed_all(model.load(path, bits), utterances, compute)
        with atomic_write(out) as temporary, temporary.open("wb") as file:
            np.savez(file, ids=np.array(utterances.ids), paths=np.array(utterances.paths), embeddings=embeddings)

    return embed


def _scorer(embedded: Path, data: str, list_: str) -> Callable[[Path], None]:
    def score(out: Path) -> None:
        utterances = source.open_source(data)
        pairs = trials.open_trials(list_, utterances)
        with np.load(embedded, allow_pickle=False) as arrays:
            embeddings = arrays["embeddings"]
        scores = cosine_scores(embeddings, embeddings, pairs.enrol, pairs.test)
        _, speaker = np.unique(np.array(utterances.speakers), return_inverse=True)
        write_json(out, evaluate(scores, pairs.label, speaker[pairs.enrol], speaker[pairs.test]))

    return score


def main() -> None:
    """Runs the command."""
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(HELP)
        return
    keep_freed_memory()
    config, workdir = parse_flags(sys.argv)
    print(study_table(study(config, workdir)), end="")


if __name__ == "__main__":
    cli.run("study", main)
