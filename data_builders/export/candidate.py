"""One candidate of a gallery, ready for the template: its picture, what became of it, and every answer."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from data_builders.engine.stages import INVALID, NOT_SELECTED, Pair, Record
from data_builders.engine.tables import CANDIDATES
from data_builders.export.pages import number, picture
from data_builders.export.tally import fill
from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.judges.questions import NO, YES
from prefopt.judges.rubric import Rubric

LETTERS = {YES: "y", NO: "n", "": "u"}


def shown_candidate(record: Record, pairs: list[Pair], rubric: Rubric, thumbnail: int) -> Record:
    """What the template says of a candidate that may be in some of its prompt's pairs."""
    own = record
    record = dict.fromkeys(CANDIDATES) | record  # an invalid one lacks what came later
    image = _picture(record, thumbnail)
    chosen = [(pair.rejected["candidate"], pair.margin) for pair in pairs if pair.chosen is own]
    rejected = [(pair.chosen["candidate"], pair.margin) for pair in pairs if pair.rejected is own]
    has = {
        "selected": record["selected"],
        "chosen": chosen,
        "rejected": rejected,
        "unpaired": not (chosen or rejected or record[INVALID]),
        "not-selected": not (record["selected"] or record[INVALID]),
        "invalid": record[INVALID],
    }
    return {
        "picture": image,
        "number": record["candidate"],
        "statuses": [name for name, holds in has.items() if holds],
        "chosen": _sides(chosen),
        "rejected": _sides(rejected),
        "reason": record[INVALID] or record[NOT_SELECTED] or "",
        "is_invalid": bool(record[INVALID]),
        "hard": number(record["hard_score"], "+g"),
        "soft": number(record["soft_score"]),
        "judge": number(record["judge_score"]),
        "discriminator": number(record["discriminator_score"]) if record["discriminator"] else "",
        "is_judged": record["hard_score"] is not None,
        "detected": record["hard_score"] is not None and bool(record["detector"]),
        "confidence": number(record["confidence"], ".2f") if record["boxes"] else "",
        "answers": _answers(record, rubric),
        "letters": _letters(record, rubric),
        "boxes": [_box(box, image["width"], image["height"]) for box in record["boxes"] or ()]
        if image
        else [],
        "origin": _origin(record),
    }


def _sides(others: list[tuple[int, float]]) -> Record:
    """An image's pairs on one side: how many, the margins from least to most, and every one in words."""
    return {
        "count": len(others),
        "other": others[0][0] if others else None,
        "margins": margins_in_words([margin for _, margin in others]),
        "all": [f"image {other} (margin {margins_in_words([margin])})" for other, margin in others],
    }


def margins_in_words(margins: list[float]) -> str:
    """The least and the largest: `0.0043 to 3.21`; a single number if they are the same."""
    ends = [min(margins), max(margins)] if margins else []
    return " to ".join(dict.fromkeys(number(end, ".2f" if end >= 0.1 else ".2g") for end in ends))


def place_in_words(rank: int | None, tied: bool, of: int) -> str:
    """`rank 2 of 8, tied`."""
    return "no rank" if rank is None else f"rank {rank} of {of}{', tied' if tied else ''}"


def _answers(record: Record, rubric: Rubric) -> list[Record]:
    """One line for each question; none for an invalid candidate."""
    names = record["questions"] if record["verdicts"] else []
    items = {item.name: (place, item) for place, item in enumerate(rubric.items, 1)}

    def column(name: str) -> list[Any]:
        return record[name] or [None] * len(names)

    columns = map(column, ("verdicts", "log_odds", "empty_log_odds", "other_mass", "points"))
    return [
        {
            "place": items[name][0],
            "name": name.replace("_", " "),
            "text": fill(items[name][1], record["class"] or "", record["prompt"]),
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


def _letters(record: Record, rubric: Rubric) -> str:
    """The answers to the rubric's questions in its order, a letter each: y, n, u for unclear, - for none."""
    names = record["questions"] if record["verdicts"] else []
    letters = {name: LETTERS[verdict] for name, verdict in zip(names, record["verdicts"] or [], strict=True)}
    return "".join(letters.get(item.name, "-") for item in rubric.items)


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


def _origin(record: Record) -> str:
    """What generated a candidate: `pocket, adapter runs/dpo at scale 0.5, 20 steps, guidance 3, seed 7`."""
    parts = [record["model"] or ""]
    if record["adapter"]:
        parts.append(f"adapter {record['adapter']} at scale {record['adapter_scale']:g}")
    parts.append(f"{record['num_inference_steps']} steps, guidance {record['guidance_scale']:g}")
    return ", ".join([*parts, f"seed {record['seed']}"])


def _picture(record: Record, thumbnail: int) -> Record | None:
    """The copy of a candidate's image; None if it has none."""
    if record["image"] is None:
        return None
    try:
        with Image.open(io.BytesIO(record["image"]["bytes"])) as opened:
            return picture(opened, thumbnail)
    except OSError as error:
        raise InputError(
            f"candidate {record['candidate']} of the prompt {record['prompt']!r} is no image: {error}. "
            "Delete the block that holds it, and run the same command again"
        ) from error
