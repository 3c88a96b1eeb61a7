"""Galleries as files: one HTML page that holds its pictures and runs no script but its own."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import data_builders
from prefopt.evaluation import words
from prefopt.evaluation.report import page_templates
from prefopt.files import reporting_write_errors, write_atomically

PIXELS = 128  # an image smaller than this is enlarged with its pixels kept square
ABSENT = "\N{EN DASH}"


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this package, `export/gallery.html.jinja`, into a file; return its path."""
    environment = page_templates(Path(data_builders.__file__).parent)
    page = environment.get_template(template).render(values)
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    return path


def picture(image: Image.Image, largest: int) -> dict[str, Any]:
    """A copy, at most `largest` pixels wide and high, as a data URI of a lossy WebP; the image's own size."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    small.save(buffer, format="WEBP", quality=82)
    return {
        "source": f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
        "is_small": max(image.size) < PIXELS,
        "copied_at": "" if small.size == image.size else f"{small.width} x {small.height}",
    }


def number(value: float | None, pattern: str = "+.2f") -> str:
    """A number in a reader's signs: 1.5 -> +1.50, NaN -> undefined, None -> a dash, 1e400 -> infinity."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return words.signed(f"{'+' if value > 0 else '-'}\N{INFINITY}")
    return words.signed(format(value, pattern))


def spread(margins: Sequence[float]) -> dict[str, str]:
    """What the page sorts a prompt by: its widest and its narrowest margin; empty without a pair."""
    return {"widest": f"{max(margins):.6g}", "narrowest": f"{min(margins):.6g}"} if margins else {}
