"""gallery.html: the images of a build, how each was judged, and why it was selected or not.

The page needs nothing beside itself. It holds small copies of the images, of a bounded number of prompts:
which of a larger build are shown follows from the hashes of their texts, so every class has its share.
"""

import base64
import hashlib
import heapq
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_builders.engine.stages import INVALID, NOT_SELECTED, Record
from data_builders.engine.tables import CANDIDATES
from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.evaluation.report import page_templates
from prefopt.files import reporting_write_errors, write_atomically

PIXELS = 128  # an image smaller than this is enlarged with its pixels kept square
ABSENT = "\N{EN DASH}"


@dataclass
class Shown:
    """The prompts on the page, ready for the template, and the counts of the whole build."""

    prompts: list[Record] = field(default_factory=list)
    total: int = 0
    candidates: int = 0
    selected: int = 0  # prompts with a selected image
    classes: set[str] = field(default_factory=set)  # of the whole build


def write_gallery(
    output: Path,
    groups: Iterable[list[Record]],
    *,
    facts: Mapping[str, str],
    thumbnail: int = 256,
    limit: int = 200,
) -> Path:
    """Write gallery.html in the folder `output`; return its path.

    A group is one prompt's candidates with the columns of `CANDIDATES`; groups are taken one after the other,
    and of each only copies of its images stay in memory, at most `thumbnail` pixels wide and high. Of more
    than `limit` prompts the page shows so many, and says how many it leaves out. `facts` are shown first.
    """
    shown = _shown(groups, limit, thumbnail)
    candidates = [candidate for prompt in shown.prompts for candidate in prompt["candidates"]]
    environment = page_templates(Path(__file__).parent)
    environment.filters["sha256"] = _sha256
    page = environment.get_template("gallery.html.jinja").render(
        title=": ".join(filter(None, ["Candidates", ", ".join(sorted(shown.classes))])),
        facts=facts,
        shown=shown,
        questions=_questions(candidates),
        classes=Counter(prompt["class"] for prompt in shown.prompts if prompt["class"]),
        reasons=Counter(c["reason"] for c in candidates if c["reason"]).most_common(),
    )
    path = output / "gallery.html"
    with reporting_write_errors(path):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    return path


def number(value: float | None, pattern: str = "+.2f") -> str:
    """A number in a reader's signs: 1.5 -> +1.50, NaN -> undefined, None -> a dash, 1e400 -> infinity."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return words.signed(f"{'+' if value > 0 else '-'}\N{INFINITY}")
    return words.signed(format(value, pattern))


def _shown(groups: Iterable[list[Record]], limit: int, thumbnail: int) -> Shown:
    """The `limit` prompts whose hashes are the smallest, in the order of the build."""
    found = Shown()
    heap: list[tuple[int, int, Record]] = []  # the largest hash on top; the place decides between equals
    for place, group in enumerate(groups):
        found.total += 1
        found.classes |= {group[0]["class"]} - {None, ""}
        found.candidates += len(group)
        found.selected += any(record["selected"] for record in group)
        key = (-int(group[0]["prompt_id"][:16], 16), -place)
        if len(heap) < limit:
            heapq.heappush(heap, (*key, _prompt(group, thumbnail)))
        elif heap and key > heap[0][:2]:
            heapq.heapreplace(heap, (*key, _prompt(group, thumbnail)))
    found.prompts = [prompt for _, _, prompt in sorted(heap, key=lambda entry: -entry[1])]
    return found


def _prompt(group: list[Record], thumbnail: int) -> Record:
    """One prompt as the template shows it: candidates by rank, those without a rank last."""
    ranks = Counter(record["rank"] for record in group)
    ordered = sorted(group, key=lambda r: (r["rank"] is None, r["rank"] or 0, r["candidate"]))
    return {
        "text": group[0]["prompt"],
        "class": group[0]["class"] or "",
        "has_selected": any(record["selected"] for record in group),
        "candidates": [_candidate(record, ranks[record["rank"]] > 1, thumbnail) for record in ordered],
    }


def _candidate(record: Record, tied: bool, thumbnail: int) -> Record:
    record = dict.fromkeys(CANDIDATES) | record  # an invalid one lacks what came later
    rank = record["rank"]
    picture = _picture(record, thumbnail)
    return {
        **picture,
        "number": record["candidate"],
        "place": "no rank" if rank is None else f"rank {rank}{', tied' if tied else ''}",
        "selected": bool(record["selected"]),
        "reason": record[INVALID] or record[NOT_SELECTED] or "",
        "is_invalid": bool(record[INVALID]),
        "hard": number(record["hard_score"], "+g"),
        "soft": number(record["judge_score"]),
        "discriminator": number(record["discriminator_score"]) if record["discriminator"] else "",
        "is_judged": record["hard_score"] is not None,
        "detected": record["hard_score"] is not None and bool(record["detector"]),
        "confidence": number(record["confidence"], ".2f") if record["boxes"] else "",
        "seed": record["seed"],
        "answers": _answers(record),
        "boxes": [_box(box, *picture["size"]) for box in record["boxes"] or ()] if picture["size"] else [],
        "source": _source(record),
    }


def _answers(record: Record) -> list[Record]:
    """One line for each question; none for an invalid candidate."""
    names = record["questions"] if record["verdicts"] else []

    def column(name: str) -> list[Any]:
        return record[name] or [None] * len(names)

    columns = map(column, ("verdicts", "log_odds", "empty_log_odds", "other_mass", "points"))
    return [
        {
            "name": name.replace("_", " "),
            "verdict": verdict or "unclear",
            "mark": verdict or "?",
            # A yes is not always good: the points say which it was.
            "sense": "good" if (points or 0) > 0 else "bad" if (points or 0) < 0 else "neither",
            "points": number(points, "+g"),
            "log_odds": number(log_odds),
            "empty": number(empty),
            "other_mass": number(other_mass, ".1%").replace("%", words.PERCENT),
        }
        for name, verdict, log_odds, empty, other_mass, points in zip(names, *columns, strict=True)
    ]


def _box(box: Mapping[str, Any], width: int, height: int) -> Record:
    """A box in percent of the image, cut off at its edges."""
    left, right = (100 * min(max(box[side] / width, 0.0), 1.0) for side in ("left", "right"))
    top, bottom = (100 * min(max(box[side] / height, 0.0), 1.0) for side in ("top", "bottom"))
    return {
        "label": box["label"],
        "confidence": number(box["confidence"], ".2f"),
        "style": f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%",
        # The words hang from the side of the box that leaves them more room.
        "from_right": left + right > 100,
    }


def _source(record: Record) -> str:
    """What generated a candidate: `pocket, adapter runs/dpo at scale 0.5, 20 steps, guidance 3`."""
    parts = [record["model"] or ""]
    if record["adapter"]:
        parts.append(f"adapter {record['adapter']} at scale {record['adapter_scale']:g}")
    parts.append(f"{record['num_inference_steps']} steps, guidance {record['guidance_scale']:g}")
    return ", ".join(parts)


def _picture(record: Record, thumbnail: int) -> Record:
    """The image as a data URI of a lossy WebP, with the width and height that boxes refer to."""
    if record["image"] is None:
        return {"image": "", "size": None, "is_small": False}
    try:
        with Image.open(io.BytesIO(record["image"]["bytes"])) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise InputError(
            f"candidate {record['candidate']} of the prompt {record['prompt']!r} is no image: {error}. "
            "Delete the block that holds it, and run the same command again"
        ) from error
    size = image.size
    image.thumbnail((thumbnail, thumbnail), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=82)
    content = base64.b64encode(buffer.getvalue()).decode()
    return {"image": f"data:image/webp;base64,{content}", "size": size, "is_small": max(size) < PIXELS}


def _questions(candidates: list[Record]) -> list[str]:
    """The names of all questions in their order: what the marks under an image stand for."""
    return list(dict.fromkeys(answer["name"] for c in candidates for answer in c["answers"]))


def _sha256(script: str) -> str:
    """What a content security policy calls a script that it lets run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
