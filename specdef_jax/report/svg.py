"""Matplotlib figures as inline SVG whose colours are CSS variables, so one figure serves light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

from specdef_jax.errors import MissingExtra

# Role -> (light, dark). Hues after Okabe and Ito, told apart under the common colour blindnesses; every
# series also has its own marker or dash.
COLOURS = {
    "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#5d6672", "#9fa8b4"),
    "rule": ("#d9dde2", "#343a43"),
    "paper": ("#ffffff", "#14171b"),
    "blue": ("#0067ac", "#66b3f0"),
    "orange": ("#c24e00", "#f59a52"),
    "green": ("#0a7d5c", "#46c79c"),
    "purple": ("#7d46a8", "#c79bea"),
    "ochre": ("#8f6b00", "#dfb733"),
    "rose": ("#b02a63", "#f285b1"),
    "red": ("#b3211c", "#ff7b72"),
}
LIGHT = {role: pair[0] for role, pair in COLOURS.items()}
_SENTINELS = {role: f"#fe01{i:02x}" for i, role in enumerate(COLOURS)}
_STYLE = {
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the layout is the same everywhere
    "font.size": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "xtick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.size": 3,
    "ytick.major.width": 0.7,
}

Draw = Callable[[Any, dict[str, str]], None]  # draw(figure, role -> colour)


def inline(name: str, title: str, description: str, size: tuple[float, float], draw: Draw) -> str:
    """Return a figure as an <svg> element that follows the colours and the font of the page.

    Args:
      name: prefix of every id inside, unique on the page.
      title: what a screen reader calls the figure.
      description: what it shows.
      size: width and height in inches; 9.6 inches fill the page.
      draw: draw(figure, colours) puts the axes on the figure.

    Raises:
      MissingExtra: matplotlib is not installed.
    """
    body = _svg(name, size, draw, _SENTINELS, {})
    for role, sentinel in _SENTINELS.items():
        body = body.replace(sentinel, f"var(--{role})")
    # The page's own font; matplotlib names its font in a shorthand with the size.
    body = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = _prefixed(name, body)
    inner = body[body.index(">", body.index("<svg")) + 1 :]
    label = f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>"
    width, height = (72 * inches for inches in size)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(title)}">{label}{inner}'
    )


def standalone(name: str, size: tuple[float, float], draw: Draw) -> bytes:
    """Return a figure as an SVG file of its own, in light colours on a light ground, text as outlines.

    Raises:
      MissingExtra: matplotlib is not installed.
    """
    body = _svg(name, size, draw, LIGHT, {"svg.fonttype": "path", "figure.facecolor": LIGHT["paper"]})
    return (body + "\n").encode()


def _svg(
    name: str, size: tuple[float, float], draw: Draw, colours: dict[str, str], style: dict[str, Any]
) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib") from error
    themed = {
        "axes.edgecolor": colours["muted"],
        "axes.facecolor": "none",
        "axes.labelcolor": colours["muted"],
        "axes.titlecolor": colours["ink"],
        "figure.facecolor": "none",
        "svg.hashsalt": name,  # ids and so the whole file are the same on every run
        "text.color": colours["ink"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
    }
    target = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the reader's matplotlibrc
        wanted: Any = _STYLE | themed | style  # matplotlib's stubs know the keys only as a literal type
        matplotlib.rcParams.update(wanted)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, colours)
        figure.savefig(
            target,
            format="svg",
            facecolor=matplotlib.rcParams["figure.facecolor"],
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = target.getvalue()
    return text[text.index("<svg") :].strip()


def _prefixed(name: str, body: str) -> str:
    """Drop ids nothing refers to, prefix the others, and drop what belongs to a file of its own."""
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    # A style element would apply to the whole page; template.html.j2 says the same for figures.
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)


def missing(package: str) -> MissingExtra:
    """Return the error for a package of the extra `cli` that is not installed."""
    return MissingExtra(
        f"the report needs {package}, which is not installed. Install it with: pip install 'specdef_jax[cli]'"
    )
