"""Rows of pictures, each with a title and a label above every picture, as one PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from prefopt.files import replacing, reporting_write_errors

_WIDTH, _HEIGHT, _LETTERS = 1.4, 2.0, 20  # of a picture's place: inches, and letters of the title


class Picture(NamedTuple):
    """A picture of a strip; None: an empty place."""

    label: str
    image: Image.Image | None
    framed: bool = False


def draw_strips(path: Path, titles: Sequence[str], strips: Sequence[Sequence[Picture]]) -> None:
    """Draw the strips below each other, each below its title, to a PNG that is whole or absent.

    Long titles are cut. A strip may be shorter than others.
    """
    columns = max(map(len, strips))
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * len(strips)), layout="constrained")
    rows = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for title, strip, row in zip(titles, strips, rows, strict=True):
        words = textwrap.shorten(title, _LETTERS * columns, placeholder=" ...")
        row.suptitle(words, x=0.02, ha="left", fontsize=8, parse_math=False)
        axes = row.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        for axis, picture in zip(axes, strip, strict=False):
            axis.set_title(picture.label, fontsize=8)
            if picture.image is not None:
                axis.imshow(picture.image)
            if picture.framed:
                frame = axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False))
                frame.set(edgecolor="tab:green", linewidth=3, clip_on=False)
    with reporting_write_errors(path), replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
