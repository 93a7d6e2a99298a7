"""The samples of a replication that are images: a row per network, a column per class."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdef_jax.replication.tables import Results, samples
from specdef_jax.report import svg

TITLE = "What the first network paints"


def pictures(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return the samples that are images, by who made them; empty if they are text."""
    return {name: made for name, made in samples(results).items() if not isinstance(made[0], str)}


def painted(results: Results) -> str:
    """Draw the images as inline SVG."""
    shown = pictures(results)
    description = "Rows: " + "; ".join(shown) + ". Columns: the classes asked for."
    return svg.inline(
        "gallery", TITLE, description, _size(shown), lambda figure, colours: draw(figure, colours, shown)
    )


def standalone(results: Results) -> bytes:
    """Draw the images as an SVG file on a light ground."""
    shown = pictures(results)
    return svg.standalone("gallery", _size(shown), lambda figure, colours: draw(figure, colours, shown))


def draw(figure: Any, colours: dict[str, str], shown: dict[str, list[dict[str, Any]]]) -> None:
    """Put every image on a figure."""
    columns = max(map(len, shown.values()))
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, (name, made) in zip(axes, shown.items(), strict=True):
        for panel, image in zip(row, made, strict=True):
            panel.imshow(_grey(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        row[0].set_ylabel(
            name, rotation=0, horizontalalignment="right", verticalalignment="center", color=colours["ink"]
        )
    for i, panel in enumerate(axes[0]):
        panel.set_title(str(i))


def _grey(image: dict[str, Any]) -> np.ndarray:
    pixels = np.frombuffer(bytes.fromhex(image["grey"]), np.uint8)
    return pixels.reshape(-1, image["width"])


def _size(shown: dict[str, Any]) -> tuple[float, float]:
    return 9.6, 0.4 + 0.62 * len(shown)
