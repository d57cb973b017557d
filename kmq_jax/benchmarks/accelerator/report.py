"""The figures as a table for the terminal, read back from their lines."""

from kmq_jax.benchmarks.timing import Figures

# What the table shows of a line, in order: key, unit or words around it, and what it is multiplied by.
_SHOWN: tuple[tuple[str, str, float], ...] = (
    ("batch", "batch {:.0f}", 1),
    ("step_seconds", "{:.1f} ms a step", 1e3),
    ("seconds", "{:.3f} s", 1),
    ("examples_per_second", "{:,.0f} examples/s", 1),
    ("share_of_peak", "{:.1f} % of peak", 100),
    ("share_of_peak_by_xla", "{:.1f} % by XLA's count", 100),
    ("ratio", "{:.3f} of full precision", 1),
    ("our_speed_over_it", "ours {:.3f} times as fast", 1),
    ("times_real_time", "{:,.0f} x real time", 1),
    ("slowdown_by_input", "{:.3f} of the step without input", 1),
    ("waiting_seconds", "waited {:.1f} ms", 1e3),
    ("times_one_sort", "{:.2f} times one sort", 1),
    ("trials", "{:,.0f} trials", 1),
    ("program_memory_gb", "the program {:.1f} GB", 1),
    ("peak_memory_gb", "peak so far {:.1f} GB", 1),
    ("compile_seconds", "compiled in {:.0f} s", 1),
)

# Goals of one H100, whose peak an H200 has, too: part, what, figure, least or most, what is asked for, in words.
_GOALS = (
    ("step", "whole", "share_of_peak_by_xla", "least", 0.45, "share of peak by XLA's count"),
    ("torch", "compiled", "our_speed_over_it", "least", 1.0, "our speed over PyTorch's, compiled"),
    ("qat", "kmqat 4 bits", "ratio", "most", 1.05, "KMQAT at 4 bits over full precision"),
    ("qat", "kmqat 2 bits", "ratio", "most", 1.05, "KMQAT at 2 bits over full precision"),
    ("extract", "resnet36", "times_real_time", "least", 10_000, "extraction, times real time"),
    (
        "input",
        "beside the step",
        "slowdown_by_input",
        "most",
        1.02,
        "never waiting for input: fed over unfed steps",
    ),
)
_CARDS = ("H100", "H200")


def describe(row: Figures) -> str:
    """A line's figures in words.

    >>> describe({"batch": 64, "step_seconds": 0.25, "share_of_peak": 0.4})
    'batch 64, 250.0 ms a step, 40.0 % of peak'
    """
    if "error" in row:
        return str(row["error"])
    shown = [form.format(row[key] * factor) for key, form, factor in _SHOWN if row.get(key) is not None]
    if "milliseconds" in row:
        parts = sorted(row["milliseconds"].items(), key=lambda item: -item[1])
        shown.append(", ".join(f"{name} {value:.1f} ms" for name, value in parts) or "no kernels seen")
    return ", ".join(shown)


def table(rows: list[Figures]) -> str:
    """The table: one line a figure, then each goal that something was measured for."""
    cards = sorted({f"{row['card']}, jax {row['jax']}" for row in rows if "card" in row})
    lines = [*cards, *(f"{row['part']:8} {row.get('what', 'ERROR')[:40]:40} {describe(row)}" for row in rows)]
    of_these = any(name in card for name in _CARDS for card in cards)
    for part, what, figure, kind, wanted, words in _GOALS if of_these else ():
        found = [r[figure] for r in rows if r["part"] == part and r.get("what") == what and r.get(figure) is not None]
        if found:
            met = found[-1] >= wanted if kind == "least" else found[-1] <= wanted
            verdict = "met" if met else "NOT met"
            lines.append(f"goal     {words}: {found[-1]:,.3f}, at {kind} {wanted:,}: {verdict}")
    return "\n".join(lines)
