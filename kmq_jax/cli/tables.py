"""`kmq-jax tables`: writes the results tables of a Markdown file from the JSON files they come from."""

from pathlib import Path

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.study import tables


def main() -> None:
    """Runs the command."""
    parser = command.parser("tables", tables.__doc__ or "", "kmq-jax tables --file=README.md")
    parser.add_argument("--file", type=Path, required=True, help="the Markdown file to fill")
    args = parser.parse_args()
    try:
        text = args.file.read_text()
    except OSError as error:
        raise UserError(f"cannot read --file={args.file}: {error.strerror}") from error
    with atomic_write(args.file) as temporary:
        temporary.write_text(tables.fill(text, args.file.parent))
