"""What the cells and the last lines of all tables are written with."""

from kmq_jax.core.files import Row
from kmq_jax.metrics.paired import told_apart


def change_of(change: Row, name: str, digits: int) -> str:
    """A change with its paired interval, bold where the interval leaves out zero; nothing where it is not known.

    >>> change_of({"eer_change": 0.5, "eer_change_ci95": [0.1, 0.9]}, "eer_change", 1)
    '**+0.5 [+0.1, +0.9]**'
    """
    interval = change.get(f"{name}_ci95")
    if interval is None:
        return ""
    text = f"{change[name]:+.{digits}f} [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    return f"**{text}**" if told_apart(interval) else text


def about_sets(sets: Row) -> str:
    r"""How many trials, speakers and utterances each set's figures come from, as far as a file tells.

    >>> about_sets({"dev": {"trials": 2000, "speakers": 10}})
    '\ndev: 2,000 trials, 10 speakers.\n'
    """
    parts = []
    for name, found in sets.items():
        if "trials" not in found:
            continue
        kinds = (
            ("trials", "trials"),
            ("targets", "of them targets"),
            ("speakers", "speakers"),
            ("utterances", "utterances"),
        )
        more = [f"{found[key]:,} {what}" for key, what in kinds if found.get(key) is not None]
        parts.append(f"{name}: {', '.join(more)}")
    return f"\n{'; '.join(parts)}.\n" if parts else ""


def markdown(rows: list[list[str]]) -> str:
    """A table of rows of cells; the first row is the header.

    >>> print(markdown([["a", "b"], ["1", "2"]]), end="")
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def corpus_of(data: str) -> str:
    """The name of a corpus: of DATA, the folder above the last, which names the part. DATA of one word stays as it is.

    >>> corpus_of("/data/words/dev")
    'words'
    """
    return "/".join(data.rstrip("/").split("/")[-2:-1]) or data
