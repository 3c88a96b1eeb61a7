"""prompts.csv: every prompt's scores of every system, for pandas and spreadsheets."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


def prompt_table(rows: Sequence[Mapping], metrics: Sequence[str]) -> str:
    """A row of each prompt and system: `prompt, system, images`, and the mean over seeds of each metric.

    RFC 4180. `images` counts the images that the means are of. A score that could not be read is left out of
    its mean, and a mean of none is empty. A text that a spreadsheet would compute as a formula, because it
    begins with = + - @, gets an apostrophe before it; numbers stay as they are. The table begins with a byte
    order mark, without which Excel does not read it as UTF-8; pandas skips it.
    """
    found: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["system"]), []).append(row["scores"])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_as_text(name) for name in ("prompt", "system", "images", *metrics))
    for (prompt, system), scores in found.items():
        means = [_mean([of_one[metric] for of_one in scores]) for metric in metrics]
        writer.writerow([_as_text(prompt), _as_text(system), len(scores), *means])
    return "\N{BYTE ORDER MARK}" + text.getvalue()


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _mean(scores: Sequence[float | bool | None]) -> float | str:
    read = [float(score) for score in scores if score is not None]
    return round(float(np.mean(read)), 6) if read else ""
