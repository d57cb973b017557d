"""`kmq-jax cascade`: runs a cascade over a trial list and tells decisions, errors and costs."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cascade.options import CascadeOptions
from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option, refuse_given
from kmq_jax.models.choices import Compute, Engine


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    policy: str | None = option("what `calibrate` wrote", None, metavar="FILE")
    levels: tuple[str, ...] = option(
        "embeddings of one level; once for each", (), flag="stage", metavar="BITS:EMBEDDINGS.npz"
    )
    cascade: str | None = option("directory of policy and models, from `calibrate --cascade`", None, metavar="DIR")
    data: str | None = option("with --cascade: DATA that the trials compare", None, metavar="DATA")
    compute: Compute = option("with --cascade: arithmetic below the last level", "float32")
    engine: Engine = option("with --cascade; auto: ONNX Runtime on a CPU, JAX on a GPU or TPU", "auto")
    reference: str | None = option("full-precision embeddings, to count flips against", None, metavar="FILE")
    trials: str = option("trial list, in VoxCeleb or Kaldi form, or synthetic:SPLIT", metavar="TRIALS")
    enrol_models: str | None = option(
        "the list enrols models: `model utterance [utterance ...]` a line", None, metavar="FILE"
    )
    out: Path | None = option(
        "write `enrol,test,score,decision,bits` here, in trial order; decision is 1 or 0", None, writes="file"
    )
    llr: bool = option("add the column `llr`, natural log likelihood ratios", False)
    json: Path | None = option("write the figures here", None, writes="file")


COMMAND = Command(
    "cascade",
    "Runs a cascade over a trial list: each trial is decided at the lowest level that is sure enough.\n"
    "Costs: `sequential` bits count every level climbed through, `utterance` the levels at which an utterance must\n"
    "be embedded, once each, and `incremental`, of a cascade calibrated with --nested, only bits that are new.\n"
    "Harmful flips: trials that the reference decides right at the same threshold and the cascade wrong. With\n"
    "--cascade and --data it runs lazily from recordings: each level embeds only those still in doubt.",
    "kmq-jax cascade --policy=policy.json --stage=2:t2.npz --stage=3:t3.npz --stage=4:t4.npz\n"
    "      --reference=t32.npz --trials=trials.txt --out=decisions.csv --json=cascade.json",
    (Files, CascadeOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(CascadeOptions, args)
    from kmq_jax.cascade import evaluate
    from kmq_jax.scoring.levels import parse_levels

    if files.llr and not files.out:
        raise UserError("`llr` adds a column to `out`, which is not given")
    if files.cascade:
        if options.stream:
            raise UserError("--cascade cannot be used with --stream")
        if not files.data or files.policy or files.levels or files.enrol_models:
            raise UserError("--cascade takes --data and --trials, without --policy, --stage and --enrol_models")
        how = options, files.reference, files.compute, files.engine, files.llr
        found = evaluate.evaluate_recordings(files.cascade, files.data, files.trials, *how)
    else:
        if not files.policy or not files.levels:
            raise UserError("--policy and --stage are needed, or else --cascade and --data")
        refuse_given(files, ("data", "compute", "engine"), "goes with `cascade`, which is not given")
        about = files.policy, parse_levels(files.levels), files.trials, options, files.reference, files.enrol_models
        if options.stream:
            refuse_given(options, ("replicates", "seed"), "does not go with `stream`, which has no intervals")
            from kmq_jax.cascade.stream import cascade_together

            cascade_together(*about, files.out, files.llr, files.json)
            return
        found = evaluate.evaluate_embeddings(*about, files.llr)
    evaluate.deliver(found, files.policy or str(files.cascade), files.out, files.llr, files.json)
