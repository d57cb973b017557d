"""`kmq-jax diagnose`: where low-bit errors come from, as tables, figures and a report."""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from kmq_jax import quant
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.data import source
from kmq_jax.data.trials import Trials, open_trials
from kmq_jax.diagnosis import people, scores
from kmq_jax.diagnosis.diagnosis import Diagnosis, Networks, Options, diagnose_scores
from kmq_jax.diagnosis.layers import correlation_rows
from kmq_jax.models.speaker_model import COMPUTE, SpeakerModel, fingerprint, load_model
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.scoring.levels import score_levels


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    usual = Options()
    parser = command.parser(
        "diagnose",
        "Compares quantized models with the full-precision model they were made from, and writes tables, figures and\n"
        "a report. Given embeddings (.npz of `extract`) in place of every model, it tells what scores alone tell.",
        "kmq-jax diagnose --reference=runs/quickstart --quantized=2:runs/quickstart-2bit.kmq\n"
        "      --data=synthetic:dev --trials=synthetic:dev --out=runs/diagnosis",
    )
    parser.add_argument("--reference", required=True, help="full-precision MODEL, or its embeddings (.npz)")
    parser.add_argument(
        "--quantized", required=True, action="append", metavar="BITS:MODEL", help="MODEL or .npz; once for each width"
    )
    parser.add_argument("--data", help="DATA that the trials compare; with embeddings: for durations, gender and age")
    parser.add_argument("--trials", default="", help="trial list, or synthetic:SPLIT (default: pairs drawn at random)")
    parser.add_argument("--out", required=True, type=Path, help="directory for tables, figures and report.html")
    parser.add_argument("--compute", default=usual.compute, choices=COMPUTE, help="the networks' arithmetic")
    parser.add_argument("--max_seconds", type=float, default=0.0, help="only so much of each recording (0: all)")
    parser.add_argument("--threshold", type=float, action="append", default=[], help="count flips here too; repeatable")
    parser.add_argument("--margin_bins", type=int, default=usual.margin_bins, help="bins of equally many trials (3)")
    parser.add_argument(
        "--margin_edges", default=",".join(map(str, usual.margin_edges)), help="edges of fixed bins (0.05,0.1,0.2)"
    )
    parser.add_argument(
        "--retention_utterances", type=int, default=usual.retention_utterances,
        help="components: all pairs of so many utterances (240); 0: the trial list",
    )  # fmt: skip
    parser.add_argument("--retention_bits", default="", help="components: widths, such as 2,3 (default: the narrowest)")
    parser.add_argument(
        "--layer_utterances", type=int, default=usual.layer_utterances,
        help="single layers: all pairs of so many utterances (32); 0: leave damage and activations out",
    )  # fmt: skip
    parser.add_argument(
        "--hessian_draws", type=int, default=usual.hessian_draws, help="for Hessian traces (10); 0: leave them out"
    )
    parser.add_argument(
        "--hessian_utterances", type=int, default=usual.hessian_utterances, help="crops they are measured on (8)"
    )
    parser.add_argument(
        "--hessian_seconds", type=float, default=usual.hessian_seconds, help="length of these crops (2.0)"
    )
    parser.add_argument("--worst", type=int, default=usual.worst, help="worst trials to list for each width (20)")
    parser.add_argument("--replicates", type=int, default=usual.replicates, help="bootstrap draws (1000); 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (0)")
    return parser


def _numbers(flag: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(f"--{flag}={text} must be numbers separated by commas") from None


def options_of(args: argparse.Namespace) -> Options:
    """The options that the flags describe.

    Raises:
        UserError: a flag's value cannot be used.
    """
    at_least = {"worst": 0, "replicates": 0, "seed": 0, "retention_utterances": 0, "layer_utterances": 0}
    at_least |= {"hessian_draws": 0, "hessian_utterances": 1, "margin_bins": 1, "max_seconds": 0}
    for name, least in at_least.items():
        if not getattr(args, name) >= least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    if not args.hessian_seconds > 0:
        raise UserError(f"--hessian_seconds={args.hessian_seconds} must be above 0")
    edges = _numbers("margin_edges", args.margin_edges, float)
    if not np.isfinite(edges).all() or (np.diff(edges, prepend=0.0) <= 0).any():
        raise UserError(f"--margin_edges={args.margin_edges} must ascend from above zero")
    if not np.isfinite(args.threshold).all():
        raise UserError("--threshold must be a finite number")
    return Options(
        thresholds=tuple(args.threshold),
        margin_edges=edges,
        retention_bits=_numbers("retention_bits", args.retention_bits, int),
        **{name: getattr(args, name) for name in at_least if name != "margin_edges"},
        hessian_seconds=args.hessian_seconds,
        compute=args.compute,
    )


def parse_quantized(given: list[str]) -> dict[int, str]:
    """Reads `BITS:MODEL` once for each width.

    Raises:
        UserError: a width is missing, is not 1 to 16, or comes twice.
    """
    found: dict[int, str] = {}
    for text in given:
        number, colon, place = text.partition(":")
        if not (colon and place and number.isdigit() and 1 <= int(number) <= 16):
            raise UserError(f"--quantized={text} must be BITS:MODEL with 1 to 16 bits, such as 2:runs/r36-2bit.kmq")
        if int(number) in found:
            raise UserError(f"--quantized={text}: {number} bits are given twice")
        found[int(number)] = place
    return found


def load_at(place: str, bits: int) -> SpeakerModel:
    """Loads a model that is to be diagnosed as one of `bits` bits; a nested one is read at that width.

    Raises:
        UserError: the model is quantized, but nothing in it at this width.
    """
    loaded = load_model(place)
    leaves = jax.tree.leaves(loaded.variables, is_leaf=quant.is_codebook_tensor)
    tensors = [leaf for leaf in leaves if quant.is_codebook_tensor(leaf)]
    widths = sorted({width for tensor in tensors for width in tensor.all_bits})
    if tensors and bits not in widths:
        raise UserError(f"--quantized={bits}:{place} holds {', '.join(map(str, widths))} bits, not {bits}")
    return load_model(place, bits) if any(tensor.coarse for tensor in tensors) else loaded


def used_only(utterances: source.Utterances, trials: Trials) -> tuple[source.Utterances, Trials]:
    """Leaves out the utterances that no trial compares."""
    rows = np.union1d(trials.enrol, trials.test)
    enrol, test = (np.searchsorted(rows, side).astype(np.int32) for side in (trials.enrol, trials.test))
    return utterances.select(rows), Trials(enrol, test, trials.label, trials.names, trials.enrol_name, trials.test_name)


def from_models(args: argparse.Namespace, quantized: dict[int, str], options: Options) -> Diagnosis:
    """The diagnosis of models."""
    if not args.data:
        raise UserError("--data is needed: the recordings that the models embed")
    reference = load_model(args.reference)
    models = {bits: load_at(place, bits) for bits, place in quantized.items()}
    table = source.open_source(args.data)
    utterances, trials = used_only(table, open_trials(args.trials, table))
    try:
        networks = Networks(reference, models, utterances, options)
        scored = networks.score(trials)
    except UserError as error:
        raise UserError(f"{args.trials or args.data}: {error}") from error
    recordings = people.Recordings(
        ids=utterances.ids,
        places=utterances.paths if utterances.reader else [str(utterances.location(i)) for i in range(len(utterances))],
        speakers=utterances.speakers,
        enrol=trials.enrol,
        test=trials.test,
        seconds=utterances.lengths() / source.SAMPLE_RATE,
        snr=networks.snr,
        genders=utterances.genders,
        ages=utterances.ages,
    )
    start = time.perf_counter()
    found = diagnose_scores(scored, recordings, options)
    networks.seconds["statistics"] = time.perf_counter() - start
    found.tables["retention"] = networks.retention(trials)
    found.tables["layers"], found.tables["blocks"] = networks.layers()
    found.tables["correlations"] = correlation_rows(found.tables["layers"], seed=options.seed)
    found.notes["seconds"] = networks.seconds
    found.notes["compute"] = options.compute
    found.notes["models"] = {str(bits): fingerprint(m) for bits, m in [(32, reference), *models.items()]}
    return found


def from_embeddings(args: argparse.Namespace, quantized: dict[int, str], options: Options) -> Diagnosis:
    """The diagnosis of embeddings, which is that of scores."""
    if not args.trials:
        raise UserError("--trials is needed with embeddings")
    widths = sorted(quantized)
    joined = score_levels([*((bits, quantized[bits]) for bits in widths), (32, args.reference)], None, args.trials)
    trials, sides, tables = joined.trials, joined.sides, joined.tables
    own = tables[-1].embeddings
    full = dict(zip(widths, joined.scores))
    test_only = None
    if all(table.embeddings.shape == own.shape for table in tables):
        test_only = {
            bits: cosine_scores(own, table.embeddings, sides.enrol, sides.test) for bits, table in zip(widths, tables)
        }
    try:
        scored = scores.scored_trials(
            joined.scores[-1], full, test_only, trials.label, sides.enrol_speaker, sides.test_speaker
        )
    except UserError as error:
        raise UserError(f"{args.trials}: {error}") from error
    first = tables[0]
    speakers: list[str] = list(first.speakers or ())
    if not speakers:
        number = np.zeros(len(first), int)
        number[sides.enrol], number[sides.test] = sides.enrol_speaker, sides.test_speaker
        speakers = [f"speaker {n}" for n in number.tolist()]
    seconds, genders, ages, places = None, {}, {}, list(first.paths or first.ids)
    if args.data:
        known = source.open_source(args.data)
        index = dict(zip(known.ids, range(len(known))))
        rows = np.array([index.get(name, -1) for name in first.ids])
        lengths = np.append(known.lengths() / source.SAMPLE_RATE, np.nan)
        seconds = lengths[rows]
        places = [str(known.location(i)) if i >= 0 else place for i, place in zip(rows.tolist(), places)]
        genders, ages = dict(known.genders), dict(known.ages)
    recordings = people.Recordings(first.ids, places, speakers, sides.enrol, sides.test, seconds, None, genders, ages)
    return diagnose_scores(scored, recordings, options)


def diagnose(args: argparse.Namespace) -> Diagnosis:
    """Does what the flags ask for; returns what was found and written."""
    options, quantized = options_of(args), parse_quantized(args.quantized)
    from kmq_jax.diagnosis import report  # matplotlib takes a second to import; here, before any work is done

    tables = [place.endswith(".npz") for place in (args.reference, *quantized.values())]
    if any(tables) and not all(tables):
        raise UserError("--reference and --quantized must be all models or all embeddings (.npz)")
    found = (from_embeddings if all(tables) else from_models)(args, quantized, options)
    found.notes["data"], found.notes["trial_list"] = args.data, args.trials or "pairs drawn at random"
    report.write(args.out, found)
    return found


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    found = diagnose(args)
    from kmq_jax.diagnosis import report

    print(report.describe(found))
    print(f"{args.out / 'report.html'}")
