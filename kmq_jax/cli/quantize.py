"""`kmq-jax quantize`: a packed low-bit model from a full-precision one, without training."""

import argparse
import dataclasses
from pathlib import Path

import jax

from kmq_jax import quant
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json
from kmq_jax.core.memory import keep_freed_memory
from kmq_jax.data import source
from kmq_jax.models.speaker_model import load_model, save_model
from kmq_jax.ptq.fit import fit_on


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "quantize",
        "Replaces every convolution and linear kernel by a k-means codebook and packed indices. No training.",
        "kmq-jax quantize --model=runs/quickstart --bits=2 --out=runs/quickstart-2bit.kmq "
        "--recalibrate=synthetic:train",
    )
    parser.add_argument("--model", required=True, help="MODEL to quantize")
    parser.add_argument("--bits", type=int, required=True, choices=range(1, 9), metavar="1-8", help="bits an index")
    parser.add_argument("--out", required=True, type=Path, help="the .kmq file to write")
    parser.add_argument("--granularity", default="channel", choices=quant.types.GRANULARITIES, help="one codebook each")
    parser.add_argument("--nested", default="", help="further, smaller widths that the file serves, such as 2,3")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="parameters to keep; repeatable")
    parser.add_argument(
        "--rules", type=Path, help='JSON: [{"pattern": REGEX, "bits": B or null}, ...], first match wins'
    )
    parser.add_argument("--recalibrate", metavar="DATA", help="fit layers on crops of these recordings")
    return parser


def rules_of(args: argparse.Namespace) -> list[quant.QuantRule]:
    """The rules that the flags describe: --skip, then --rules, then --bits for every kernel.

    Raises:
        UserError: a flag's value cannot be used.
    """
    try:
        coarse = tuple(int(width) for width in args.nested.split(",") if width)
    except ValueError:
        raise UserError(f"--nested={args.nested} must be widths separated by commas") from None
    spec = quant.QuantSpec(args.bits, granularity=args.granularity, coarse=coarse)
    rules = [quant.QuantRule(pattern, None) for pattern in args.skip]
    for entry in read_json(args.rules) if args.rules else []:
        if not isinstance(entry, dict) or set(entry) != {"pattern", "bits"}:
            raise UserError(f"{args.rules}: {entry!r} must have `pattern` and `bits`")
        bits = entry["bits"]
        own = None if bits is None else dataclasses.replace(spec, bits=bits, coarse=())
        rules.append(quant.QuantRule(entry["pattern"], own))
    return [*rules, quant.QuantRule(r"/kernel$", spec)]


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    keep_freed_memory()
    rules = rules_of(args)
    reference = load_model(args.model)
    leaves = jax.tree.leaves(reference.variables, is_leaf=quant.is_codebook_tensor)
    if any(quant.is_codebook_tensor(leaf) for leaf in leaves):
        raise UserError(f"--model={args.model} is quantized already: quantize the model it was made from")
    params = quant.quantize_params(reference.variables["params"], rules)
    quantized = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    if args.recalibrate:
        quantized = fit_on(reference, quantized, source.open_sources(args.recalibrate))
    save_model(args.out, quantized)
    before = quant.size_bytes(reference.variables).total
    print(
        f"{args.out}: {args.out.stat().st_size:,} bytes, {before / args.out.stat().st_size:.1f} times smaller than FP32"
    )
