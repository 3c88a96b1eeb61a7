"""gallery.html: the answers of a self-critique beside their images, and why each is in a pair or in none.

The page needs nothing beside itself. It holds small copies of the images, of a bounded number of prompts:
which of a larger build are shown follows from the hashes of prompts and images.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_builders.answers.selection import REASONS, SENTENCES, is_consistent, why_no_pair
from data_builders.engine.stages import INVALID, NOT_SELECTED, Group, Record
from data_builders.export.pages import number, picture, spread, write_page


def write_gallery(
    output: Path,
    groups: Iterable[Group],
    images: Callable[[Record], Sequence[Image.Image]],
    *,
    total: int,
    facts: Mapping[str, str],
    thumbnail: int = 384,
    limit: int = 200,
) -> Path:
    """Write gallery.html in the folder `output`; return its path.

    A group is one prompt's answers with its pairs, of `total` prompts; `images` opens the pictures of an
    answer's prompt, which is done for at most `limit` prompts. `facts` are shown first.
    """
    numbered = enumerate(groups)
    sample = heapq.nsmallest(limit, numbered, key=lambda entry: entry[1].candidates[0]["prompt_id"])
    prompts = [_prompt(group, images, thumbnail) for _, group in sorted(sample, key=lambda entry: entry[0])]
    return write_page(
        output / "gallery.html",
        "answers/gallery.html.jinja",
        title="Answers and pairs",
        facts=facts,
        total=total,
        prompts=prompts,
        has_margins=any("widest" in prompt for prompt in prompts),
        kinds=_kinds(prompts),
        sentences=SENTENCES,
    )


def _prompt(group: Group, images: Callable[[Record], Sequence[Image.Image]], thumbnail: int) -> Record:
    """One prompt as the template shows it: answers by rank, those without a rank last."""
    first = group.candidates[0]
    pictures = [picture(image, thumbnail) for image in images(first)]
    ordered = sorted(group.candidates, key=lambda r: (r["rank"] is None, r["rank"] or 0, r["candidate"]))
    chosen = {pair.chosen["candidate"] for pair in group.pairs}
    rejected = {pair.rejected["candidate"] for pair in group.pairs}
    margins = [pair.margin for pair in group.pairs]
    reason = why_no_pair(group)
    kinds = [f"without-{REASONS.index(reason)}"] if reason else ["pair"]
    if not all(map(is_consistent, group.pairs)):
        kinds.append("inconsistent")
    shown = {
        "images": pictures,
        "messages": [{"role": m["role"], "text": _words(m, len(pictures))} for m in first["prompt"]],
        "reference": first["reference"],
        "row": first["item"],
        "reason": reason,
        "kinds": kinds,
        "pairs": [
            {
                "chosen": pair.chosen["candidate"],
                "rejected": pair.rejected["candidate"],
                "p": number(0.5 + pair.margin, ".2f"),
                "consistent": is_consistent(pair),
            }
            for pair in group.pairs
        ],
        "answers": [
            {
                "number": record["candidate"],
                "text": record["answer"],
                "tokens": record["tokens"],
                "finished": record["finished"],
                "score": "" if record["score"] is None else number(record["score"], ".2f"),
                "is_chosen": record["candidate"] in chosen,
                "is_rejected": record["candidate"] in rejected,
                "reason": record[INVALID] or record[NOT_SELECTED],
                "is_invalid": bool(record[INVALID]),
            }
            for record in ordered
        ],
    }
    return shown | spread(margins)


def _words(message: dict, images: int) -> str:
    """A message's text, with a sign where it shows one of several images."""
    sign = ["[image]"] if images > 1 else []
    return " ".join(
        text for b in message["content"] for text in (sign if b["type"] == "image" else [b["text"]])
    )


def _kinds(prompts: list[Record]) -> dict[str, tuple[str, int]]:
    """What prompts can be filtered by: what it is called, and how many prompts are of it."""
    counts = Counter(kind for prompt in prompts for kind in prompt["kinds"])
    told = {"pair": "with a pair", "inconsistent": "a pair whose two orders disagree"}
    told |= {f"without-{place}": f"no pair: {SENTENCES[reason]}" for place, reason in enumerate(REASONS)}
    return {name: (words, counts[name]) for name, words in told.items() if counts[name]}
