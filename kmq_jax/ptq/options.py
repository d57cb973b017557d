"""Options of quantization without training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option, shown


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Options):
    """Which tensors are quantized, and to how many bits."""

    bits: int | None = option("bits an index, 1 to 8; or give `budget` or `size`", None, at_least=1, at_most=8)
    budget: float | None = option("bits an index on average; layers get what they need; needs DATA", None, above=0)
    size: str | None = option("or the file's size, such as 2MB; needs DATA", None, metavar="BYTES")
    granularity: Literal["channel", "tensor"] = option(
        "what has a codebook of its own; tensor goes with `unfitted` alone", "channel"
    )
    levels: Literal["kmeans", "uniform", "minmax", "powers"] = option(
        "where levels may lie: anywhere; evenly, scale and offset fitted; evenly over the weights' range; at powers of "
        "two, scale fitted",
        "kmeans",
    )
    nested: tuple[int, ...] = option("fewer bits at which the same file can be read, such as 2,3", (), at_least=1)
    activations: int | None = option(
        "bits of what goes into quantized convolutions, 8; linear and LSTM layers stay in floating point. Needs DATA. "
        "Left out: floating point",
        None,
    )
    biases: Literal["float32", "float16"] = option(
        "the type that biases are stored in; what float16 cannot hold stays float32", "float32"
    )
    skip: tuple[str, ...] = option("parameters to keep in full precision; repeatable", (), metavar="REGEX")
    rules: Path | None = option('JSON: [{"pattern": REGEX, "bits": B or null}, ...], first match wins', None)

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: "`name` (=value) must be ...".
        """
        super().__post_init__()
        if self.activations not in (None, 8):
            raise UserError(f"`activations` (={self.activations}) must be 8, or left out")
        if sum(given is not None for given in (self.bits, self.budget, self.size)) != 1:
            raise UserError("one of --bits, --budget and --size is needed")
        if self.nested and self.bits is None:
            raise UserError(f"`nested` (={shown(self.nested)}) needs `bits`")
        if any(bits >= (self.bits or 0) for bits in self.nested):
            raise UserError(f"`nested` (={shown(self.nested)}) must be below `bits` (={self.bits})")


def check_data(options: QuantizeOptions, data: str | None, unfitted: bool) -> None:
    """Refuses options that do not go with the data, or with the fitting, that was asked for.

    Args:
        options: of the quantization.
        data: DATA, where given.
        unfitted: weights are rounded as they are.

    Raises:
        UserError: names the flags.
    """
    if not data and (options.activations or options.bits is None):
        raise UserError("--activations, --budget and --size need --data: speech that ranges and layers are measured on")
    if options.granularity == "tensor" and not unfitted:
        raise UserError("--granularity=tensor needs --unfitted: layers are fitted channel by channel")
