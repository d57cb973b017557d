"""`python -m kmq_jax.study`: a network in full precision and at every width, from training to a cascade and a report.

Steps: train (or import) the full-precision network; quantize it without training; train it quantized, at each width
and with nested codebooks; embed and score the evaluation sets with every one; diagnose; calibrate cascades and run
them. A step that is done is not repeated; one whose settings changed is, with all that depends on it.
"""

import argparse
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from kmq_jax import quant
from kmq_jax.cli import calibrate, cascade, diagnose, extract, score
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, read_json, write_json
from kmq_jax.data import source, trials
from kmq_jax.interop import pretrained
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model
from kmq_jax.ptq.fit import fit_on
from kmq_jax.study import report
from kmq_jax.study.steps import Steps
from kmq_jax.training import loop, qat
from kmq_jax.training.config import quantized
from kmq_jax.training.options import QatOptions

NESTED = "nested"
FULL = 32  # bits that stand for full precision
HALVES = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Network:
    """A model of the study, read at one width.

    Attributes:
        step: that made it, such as "kmqat-2" or "ptq-nested".
        method: for people.
        bits: its width.
        path: the MODEL.
        read_at: the width at which a nested model is read, else None.
    """

    step: str
    method: str
    bits: int
    path: Path
    read_at: int | None = None

    @property
    def name(self) -> str:
        """Names its embeddings and scores."""
        return f"{self.step}-{self.bits}"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set: its name, DATA and TRIALS."""

    name: str
    data: str
    trials: str


def study(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what is not done yet.

    Args:
        config: of the full-precision run, with its `study` section.
        workdir: gets models, embeddings, scores, `diagnosis/`, `cascades/`, `steps.json`, `study.json`, `report.html`.

    Returns:
        What `study.json` holds: `rows`, one a model, with `model`, `method`, `bits`, `bytes` and the metrics of each
        evaluation set; `diagnosis`, by evaluation set; `cascades`; `published`.

    Raises:
        UserError: a setting, file or value is at fault.
    """
    section = config.study
    sets = {name: EvaluationSet(name, place.data, place.trials) for name, place in section.evaluate.items()}
    if not sets:
        raise UserError("study.evaluate names no evaluation set")
    for name in (*section.diagnose, *([section.calibrate] if section.cascades else ())):
        if name not in sets:
            raise UserError(f"study: {name!r} is none of the evaluation sets {', '.join(sets)}")
    steps = Steps(workdir)
    networks = make_networks(config, steps)
    for evaluated in sets.values():
        for network in networks:
            embed(steps, network, evaluated, section.compute)
    summary = {
        "rows": [measure(steps, network, sets.values(), section.groups.to_dict()) for network in networks],
        "diagnosis": {name: run_diagnosis(steps, config, networks, sets[name]) for name in section.diagnose},
        "cascades": [run_cascade(steps, config, networks, sets, *chosen) for chosen in section.cascades],
        "published": section.published.to_dict(),
    }
    write_json(workdir / "study.json", summary)
    report.write(workdir, summary, json.loads(config.to_json()))
    return summary


def make_networks(config: ml_collections.ConfigDict, steps: Steps) -> list[Network]:
    """Trains, imports and quantizes: the full-precision network first, then each width."""
    section, given = config.study, Path(config.init_from)
    if given.suffix in (".onnx", ".pt", ".pth", ".ckpt", ".safetensors"):
        if not given.is_file():
            raise UserError(f"init_from={given}: there is no such file")
        about = calibrate.fingerprint(str(given))
        reference = steps.run("fp32", about, (), "fp32.kmq", functools.partial(_import, given))
    elif config.init_from:
        name = fingerprint(load_model(given))
        steps.run("fp32", name, (), "fp32.json", lambda path: write_json(path, str(given)))
        reference = given
    else:
        reference = steps.run("fp32", _settings(config), (), "fp32", functools.partial(_finish, config))
    networks = [Network("fp32", "full precision", FULL, reference)]
    widths = sorted(section.bits, reverse=True)
    runs: list[tuple[str, int, tuple[int, ...], str]] = [(str(bits), bits, (), "") for bits in widths]
    if section.nested:
        runs.append((NESTED, widths[0], tuple(widths[1:]), ", nested"))
    for name, bits, coarse, suffix in runs:
        narrow = f"kmqat-{min(coarse)}" if coarse else ""
        own = kmqat_config(config, name, bits, coarse, str(reference), str(steps.directory / narrow) if narrow else "")
        rules = [_settings(own)["quant"], own.data.train]
        untrained, trained = functools.partial(quantize, own, reference), functools.partial(_finish, own)
        made = {"ptq": ("without training", steps.run(f"ptq-{name}", rules, ("fp32",), f"ptq-{name}.kmq", untrained))}
        before = ("fp32", narrow) if narrow else ("fp32",)
        if own.epochs:
            made["kmqat"] = (
                "trained",
                steps.run(f"kmqat-{name}", _settings(own), before, f"kmqat-{name}", trained),
            )
        for step, (method, path) in made.items():
            for width in (bits, *coarse):
                read_at = width if coarse else None
                networks.append(Network(f"{step}-{name}", method + suffix, width, path, read_at))
    return networks


def kmqat_config(
    config: ml_collections.ConfigDict, name: str, bits: int, coarse: tuple[int, ...], reference: str, narrow: str
) -> ml_collections.ConfigDict:
    """The configuration of the quantized run `name`: the full-precision one's, with the `study` section's changes."""
    own = quantized(copy.deepcopy(config), bits, coarse=coarse, grow_from=narrow, rules=config.study.rules)
    own.init_from = reference
    own.average_last = 0
    own.loss.weight = config.study.label_weight
    own.epochs = config.study.epochs.get(name, 0.0)
    if coarse and not config.study.epochs.get(str(min(coarse))):
        own.epochs = 0.0
    if config.study.learning_rate:
        own.learning_rate.peak = config.study.learning_rate
    own.validation.data = ""
    return own


def quantize(config: ml_collections.ConfigDict, reference: Path, out: Path) -> None:
    """Quantizes a model by the rules of a configuration, without training, fitted on training crops."""
    full = load_model(reference)
    params = quant.quantize_params(full.variables["params"], qat.rules_of(QatOptions.of(config.quant.to_dict())))
    packed = SpeakerModel(full.architecture, full.settings, full.frontend, {**full.variables, "params": params})
    if config.quant.fit_crops:
        packed = fit_on(full, packed, source.open_sources(config.data.train), config.quant.fit_crops)
    save_model(out, packed)


def embed(steps: Steps, network: Network, evaluated: EvaluationSet, compute: str) -> Path:
    """The embeddings of an evaluation set by a network."""
    name = f"{network.name}-{evaluated.name}"

    def action(out: Path) -> None:
        width = [f"--bits={network.read_at}"] if network.read_at else []
        words = [f"--model={network.path}", f"--data={evaluated.data}", f"--compute={compute}", f"--out={out}"]
        extract.extract(extract.flags().parse_args(words + width))

    about = [evaluated.data, compute, network.bits]
    return steps.run(f"embed-{name}", about, (network.step,), f"embeddings/{name}.npz", action)


def measure(
    steps: Steps, network: Network, sets: Iterable[EvaluationSet], groups: dict[str, Sequence[str]]
) -> dict[str, Any]:
    """One row of the results: a network's size, its metrics on each evaluation set, and mean EERs of groups of sets."""
    found = {}
    for evaluated in sets:
        name = f"{network.name}-{evaluated.name}"
        words = [f"--embeddings={steps.directory}/embeddings/{name}.npz", f"--trials={evaluated.trials}"]
        action = _command(score.flags, score.score, words, "json")
        made = steps.run(f"score-{name}", evaluated.trials, (f"embed-{name}",), f"metrics/{name}.json", action)
        found[evaluated.name] = read_json(made)
    size = quant.size_bytes(load_model(network.path).variables).total
    inside = network.path.is_relative_to(steps.directory)
    place = network.path.relative_to(steps.directory) if inside else network.path
    return {
        "model": str(place),
        "method": network.method,
        "bits": network.bits,
        "bytes": size,
        "sets": found,
        "groups": {name: float(np.mean([found[one]["eer"] for one in members])) for name, members in groups.items()},
    }


def run_diagnosis(
    steps: Steps, config: ml_collections.ConfigDict, networks: Sequence[Network], evaluated: EvaluationSet
) -> dict[str, Any]:
    """Where the errors of the trained widths come from (the nested one's where a width has no run of its own).

    Returns:
        Those of its tables that are short.
    """
    nested = {network.bits: network for network in networks if network.step == f"kmqat-{NESTED}"}
    own = {network.bits: network for network in networks if network.step in _family("kmqat", config.study.bits)}
    chosen = list((nested | own).values())
    words = [f"--reference={networks[0].path}", f"--data={evaluated.data}", f"--trials={evaluated.trials}"]
    words += [f"--quantized={network.bits}:{network.path}" for network in chosen]
    words += [f"--compute={config.study.compute}", *config.study.diagnose_flags]
    action = _command(diagnose.flags, diagnose.diagnose, words, "out")
    needs = ["fp32", *(network.step for network in chosen)]
    about = [evaluated.data, evaluated.trials, config.study.compute, config.study.diagnose_flags]
    out = steps.run(f"diagnose-{evaluated.name}", about, needs, f"diagnosis/{evaluated.name}", action)
    found = read_json(out / "diagnosis.json")
    return {key: found[key] for key in ("systems", "retention", "correlations")} | {
        "knees": found["notes"]["knees"],
        "directory": str(out.relative_to(steps.directory)),
    }


def run_cascade(
    steps: Steps,
    config: ml_collections.ConfigDict,
    networks: Sequence[Network],
    sets: dict[str, EvaluationSet],
    family: str,
    widths: Sequence[int],
) -> dict[str, Any]:
    """Calibrates a cascade on one set and runs it on all.

    The calibration set itself is evaluated crosswise: its speakers are halved, and each half is decided by a policy
    from the other half.

    Args:
        steps: of the study.
        config: its configuration.
        networks: all there are.
        sets: the evaluation sets.
        family: "kmqat", "ptq", "kmqat-nested" or "ptq-nested".
        widths: ascending; 32 is full precision.
    """
    known = {network.bits: network for network in networks if network.step in _family(family, config.study.bits)}
    known[FULL] = networks[0]
    if missing := [bits for bits in widths if bits not in known]:
        raise UserError(f"study.cascades: there is no network of {missing[0]} bits in {family!r}")
    stages = [known[bits] for bits in widths]
    title = ">".join("FP32" if bits == FULL else str(bits) for bits in widths)
    name = f"{family}-{'-'.join(map(str, widths))}"
    about = [list(widths), config.study.calibrate_flags]

    def embeddings(evaluated: EvaluationSet) -> list[str]:
        place = f"{steps.directory}/embeddings"
        files = [f"--stage={one.bits}:{place}/{one.name}-{evaluated.name}.npz" for one in stages]
        return [*files, f"--reference={place}/{networks[0].name}-{evaluated.name}.npz"]

    def needs(evaluated: EvaluationSet) -> list[str]:
        return [f"embed-{one.name}-{evaluated.name}" for one in (networks[0], *stages)]

    def calibrated(list_: str, suffix: str, before: Sequence[str], bundle: bool = False) -> Path:
        words = [*embeddings(base), f"--trials={list_}", *config.study.calibrate_flags]
        if bundle:
            words += [f"--cascade={steps.directory}/cascades/{name}"]
            words += [f"--model={one.bits}:{one.path}" for one in stages]
        action = _command(calibrate.flags, calibrate.calibrate, words, "out")
        out = f"cascades/{name}{suffix}/policy.json"
        return steps.run(f"calibrate-{name}{suffix}", [about, list_], before, out, action)

    def evaluated_by(policy: str, list_: str, evaluated: EvaluationSet, suffix: str) -> dict[str, Any]:
        words = [f"--policy={steps.directory}/cascades/{name}{policy}/policy.json", *embeddings(evaluated)]
        action = _command(cascade.flags, cascade.cascade, [*words, f"--trials={list_}"], "json")
        before = [f"calibrate-{name}{policy}", *needs(evaluated)]
        step = f"cascade-{name}-{evaluated.name}{suffix}"
        return read_json(steps.run(step, [about, list_], before, f"cascades/{name}{policy}/{step}.json", action))

    base = sets[config.study.calibrate]
    halves = halve(steps, base)
    calibrated(base.trials, "", needs(base), bundle=True)
    crossed = []
    for half, other in zip(HALVES, reversed(HALVES)):
        calibrated(str(halves / f"{half}.txt"), f"-{half}", [*needs(base), f"halves-{base.name}"])
        crossed.append(evaluated_by(f"-{half}", str(halves / f"{other}.txt"), base, f"-{other}"))
    results = {base.name: {"halves": crossed, **_mean(crossed)}}
    for evaluated in sets.values():
        if evaluated is not base:
            results[evaluated.name] = evaluated_by("", evaluated.trials, evaluated, "")
    groups = {group: [results[one]["eer"] for one in members] for group, members in config.study.groups.items()}
    return {
        "name": title,
        "family": family,
        "widths": list(widths),
        "directory": f"cascades/{name}",
        "sets": results,
        "groups": {group: float(np.mean(eers)) for group, eers in groups.items()},
    }


def halve(steps: Steps, evaluated: EvaluationSet) -> Path:
    """Trial lists `a.txt` and `b.txt` of each half of a set's speakers, dealt at random; trials across are left out."""

    def action(out: Path) -> None:
        table = source.open_source(evaluated.data)
        pairs = trials.open_trials(evaluated.trials, table)
        speakers, speaker = np.unique(np.array(table.speakers), return_inverse=True)
        half = np.random.default_rng(0).permutation(len(speakers)) % 2
        sides = half[speaker[pairs.enrol]], half[speaker[pairs.test]]
        names = np.array(table.ids)
        for number, name in enumerate(HALVES):
            rows = np.flatnonzero((sides[0] == number) & (sides[1] == number))
            columns = pairs.label[rows].astype(int), names[pairs.enrol[rows]], names[pairs.test[rows]]
            with atomic_write(out / f"{name}.txt") as temporary:
                temporary.write_text("".join(f"{y} {a} {b}\n" for y, a, b in zip(*columns)))

    return steps.run(
        f"halves-{evaluated.name}", [evaluated.data, evaluated.trials], (), f"halves/{evaluated.name}", action
    )


def _mean(halves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of two halves' figures, of those the report shows."""
    keys = (
        *("eer", "reference_eer", "harmful_flip_rate", "beneficial_flip_rate", "sequential_bits", "incremental_bits"),
        *("utterance_bits", "utterance_incremental_bits", "resolved", "remaining_flips", "each_width_alone"),
    )
    shown = [{key: half[key] for key in keys} for half in halves]
    mean: dict[str, Any] = jax.tree.map(lambda *values: float(np.mean(values)), *shown)
    return mean


def _family(family: str, widths: Sequence[int]) -> set[str]:
    """The steps that make the networks of a family."""
    return {family} if family.endswith(NESTED) else {f"{family}-{bits}" for bits in widths}


def _command(
    flags: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], Any],
    words: Sequence[str],
    out: str,
) -> Callable[[Path], None]:
    """A step that does what a command does, writing to its flag `out`."""
    return lambda path: run(flags().parse_args([*words, f"--{out}={path}"]))


def _settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a training run depends on."""
    return {key: value for key, value in json.loads(config.to_json()).items() if key != "study"}


def _import(given: Path, out: Path) -> None:
    save_model(out, SpeakerModel(*pretrained.read(given, None, None)))


def _finish(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if not loop.train(config, workdir)["finished"]:
        raise UserError(f"{workdir}: training was stopped; the same command goes on from there")
