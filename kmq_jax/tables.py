"""`python -m kmq_jax.tables`: writes the results tables of a Markdown file from the JSON files they come from.

A table stands between `<!-- table: FILE.json -->` and `<!-- end -->`; the path is relative to the Markdown file. What
the JSON holds decides what the table shows: `study.json` gives one row a model.
"""

import re
from pathlib import Path
from typing import Any

from kmq_jax.core import cli
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, read_json

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def study_table(summary: dict[str, Any]) -> str:
    """The results of a study: size, and EER in percent with its 95 % interval on each evaluation set."""
    sets = list(summary["rows"][0]["sets"])
    head = ["bits", "weights", "KiB", *(f"{name}, EER %" for name in sets)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in summary["rows"]:
        cells = [str(row["bits"]), row["method"], f"{row['bytes'] / 1024:,.0f}"]
        for name in sets:
            eer, interval = row["sets"][name]["eer"], row["sets"][name]["eer_ci95"]
            cells.append(f"{eer:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fill(text: str, directory: Path) -> str:
    """The Markdown `text` with its tables written afresh.

    Raises:
        UserError: a JSON file is missing, or is none of a study.
    """

    def table(match: re.Match[str]) -> str:
        try:
            return match[1] + study_table(read_json(directory / match[2])) + match[3]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{directory / match[2]} is not a study's results: it lacks {error}") from error

    return BLOCK.sub(table, text)


def main() -> None:
    """Runs the command."""
    parser = cli.parser("tables", __doc__ or "", "python -m kmq_jax.tables --file=README.md")
    parser.add_argument("--file", type=Path, required=True, help="the Markdown file to fill")
    args = parser.parse_args()
    try:
        text = args.file.read_text()
    except OSError as error:
        raise UserError(f"cannot read --file={args.file}: {error.strerror}") from error
    with atomic_write(args.file) as temporary:
        temporary.write_text(fill(text, args.file.parent))


if __name__ == "__main__":
    cli.run("tables", main)
