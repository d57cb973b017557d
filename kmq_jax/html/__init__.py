"""Reports as single HTML pages that load nothing from elsewhere; their templates lie beside this file."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from kmq_jax.core.files import atomic_write

WIDTH = 5.6
"""Width of a page's figures in inches: shown at a phone's 360 pixels, a point is still about a pixel."""


def png(figure: Figure) -> bytes:
    """A figure as PNG, sharp on dense screens.

    >>> png(Figure(figsize=(1, 1)))[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"savefig.dpi": 160}):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, page: str, pictures: Mapping[str, bytes], **values: object) -> None:
    """Writes a page.

    Args:
        path: the file.
        page: name of the template, without its suffix.
        pictures: PNG files that the page shows, by name.
        **values: what else the page uses.

    Raises:
        jinja2.UndefinedError: the page uses a name that is not among the values.
        UserError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kmq_jax.html", "."),
        # Names of files and speakers come from users' data.
        autoescape=True,
        # A misspelt name raises, instead of leaving a gap in the report.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "interval": interval, "p": p_value}
    # Pictures go into the page itself, so that it stays whole when it is moved or mailed.
    images = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in pictures.items()}
    text = environment.get_template(f"{page}.html.j2").render(images=images, **values)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files are any bytes


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number with a true minus sign, and a plus where wanted; a dash for None and NaN.

    >>> number(-0.5), number(0.5, 1, signed=True), number(None), number(-math.inf)
    ('−0.500', '+0.5', '–', '−∞')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as percent; a dash for None and NaN.

    >>> percent(0.0123)
    '1.23 %'
    """
    return "–" if value is None or math.isnan(value) else f"{number(100 * value, digits)} %"


def interval(value: Sequence[float] | None, digits: int = 3, scale: float = 1.0) -> str:
    """An interval in brackets, its ends times `scale`; nothing for None.

    >>> interval([0.01, 0.02], digits=1, scale=100)
    '[1.0, 2.0]'
    """
    return "" if not value else f"[{number(scale * value[0], digits)}, {number(scale * value[1], digits)}]"


def p_value(value: float | None) -> str:
    """A p-value to four digits; a dash for None and NaN.

    >>> p_value(0.25), p_value(1e-9)
    ('0.2500', '< 0.0001')
    """
    if value is None or math.isnan(value):
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
