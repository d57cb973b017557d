"""`kmq-jax quantize`: a packed low-bit model from a full-precision one, without training."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option, refuse_given
from kmq_jax.ptq.options import QuantizeOptions, check_data

if TYPE_CHECKING:
    from kmq_jax.models.speaker_model import SpeakerModel
    from kmq_jax.quant.types import QuantRule


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL to quantize", metavar="MODEL")
    out: Path = option("the .kmq file to write", writes="file")
    data: str | None = option("fit layers on crops of it; left out: of the embedded voices", None, metavar="DATA")
    crops: int = option("crops of 2 s: more can fit better, but take time and memory", 100, at_least=1, at_most=1000)
    unfitted: bool = option("round weights as they are: errors multiply at few bits", False)

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        if self.unfitted:
            refuse_given(self, ("data", "crops"), "does not go with `unfitted`")


COMMAND = Command(
    "quantize",
    "Replaces every convolution and linear kernel by a k-means codebook and packed indices. No training.",
    "kmq-jax quantize --model=runs/quickstart --bits=2 --out=runs/quickstart-2bit.kmq --data=synthetic:train",
    (Files, QuantizeOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(QuantizeOptions, args)
    from kmq_jax.core.memory import keep_freed_memory

    keep_freed_memory()  # before JAX starts its threads
    from kmq_jax import quant
    from kmq_jax.core.tree import named_leaves
    from kmq_jax.models.speaker_model import load_model, save_model
    from kmq_jax.ptq.quantize import EMBEDDED, describe_loss, fitting, measured_loss, quantize_model, rules_of

    check_data(options, files.data, files.unfitted)
    rules, model = rules_of(options), load_model(files.model)
    data = None if files.unfitted else files.data or EMBEDDED
    try:
        if options.bits is None:
            rules = _within_budget(files, options, model)
        quantized = quantize_model(model, rules, data, files.crops, options.biases, options.activations)
    except UserError as error:
        raise UserError(f"--model={files.model}: {error}") from error
    save_model(files.out, quantized)
    before = 4 * sum(leaf.size for _, leaf in named_leaves(model.variables))  # the model may be of bfloat16
    after = files.out.stat().st_size or quant.size_bytes(quantized.variables).total  # a device has no size
    print(f"{files.out}: {after:,} bytes, {before / after:.1f} times smaller than FP32; {fitting(data)}")
    if options.bits is None:
        print(describe_loss(measured_loss(model, quantized, str(data), files.crops)))


def _within_budget(files: Files, options: QuantizeOptions, model: "SpeakerModel") -> "list[QuantRule]":
    """Prints the curve of predicted damage against size, draws it, and gives the rules of the budget."""
    from kmq_jax.ptq import budget
    from kmq_jax.ptq.quantize import rules_within

    rules, found, bits_of = rules_within(model, options, str(files.data), files.out.parent)
    print(budget.report(found, bits_of, files.out))
    return rules
