"""gallery.html: the answers of a self-critique beside their images, and why each is in a pair or in none.

The page needs nothing beside itself. It holds small copies of the images, of a bounded number of prompts:
which of a larger build are shown follows from the hashes of prompts and images.
"""

import base64
import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_builders.answers.selection import is_consistent, pair_key, why_no_pair
from data_builders.engine.stages import INVALID, NOT_SELECTED, Group, Record
from data_builders.export.gallery import PIXELS, number
from prefopt.evaluation.report import page_templates
from prefopt.files import reporting_write_errors, write_atomically


def write_gallery(
    output: Path,
    groups: Iterable[Group],
    images: Callable[[Record], Sequence[Image.Image]],
    *,
    total: int,
    facts: Mapping[str, str],
    thumbnail: int = 320,
    limit: int = 200,
) -> Path:
    """Write gallery.html in the folder `output`; return its path.

    A group is one prompt's answers with its pairs, of `total` prompts; `images` opens the pictures of an
    answer's prompt, which is done for at most `limit` prompts. `facts` are shown first.
    """
    numbered = enumerate(groups)
    sample = heapq.nsmallest(limit, numbered, key=lambda entry: entry[1].candidates[0]["prompt_id"])
    prompts = [_prompt(group, images, thumbnail) for _, group in sorted(sample, key=lambda entry: entry[0])]
    environment = page_templates(Path(__file__).parent)
    environment.filters["sha256"] = _sha256
    page = environment.get_template("gallery.html.jinja").render(
        facts=facts,
        total=total,
        prompts=prompts,
        reasons=Counter(prompt["reason"] for prompt in prompts if prompt["reason"]).most_common(),
    )
    path = output / "gallery.html"
    with reporting_write_errors(path):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    return path


def _prompt(group: Group, images: Callable[[Record], Sequence[Image.Image]], thumbnail: int) -> Record:
    """One prompt as the template shows it: answers by rank, those without a rank last."""
    first = group.candidates[0]
    pictures = [_picture(image, thumbnail) for image in images(first)]
    ordered = sorted(group.candidates, key=lambda r: (r["rank"] is None, r["rank"] or 0, r["candidate"]))
    chosen = {pair.chosen["candidate"] for pair in group.pairs}
    rejected = {pair.rejected["candidate"] for pair in group.pairs}
    return {
        "images": pictures,
        "messages": [{"role": m["role"], "text": _words(m, len(pictures))} for m in first["prompt"]],
        "reference": first["reference"],
        "row": first["item"],
        "reason": why_no_pair(group),
        "pairs": [
            {
                "key": pair_key(pair),
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


def _words(message: dict, images: int) -> str:
    """A message's text, with a sign where it shows one of several images."""
    sign = ["[image]"] if images > 1 else []
    return " ".join(
        text for b in message["content"] for text in (sign if b["type"] == "image" else [b["text"]])
    )


def _picture(image: Image.Image, thumbnail: int) -> Record:
    """The image as a data URI of a lossy WebP, with its size."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((thumbnail, thumbnail), Image.Resampling.LANCZOS)
    small.save(buffer, format="WEBP", quality=82)
    content = base64.b64encode(buffer.getvalue()).decode()
    return {
        "source": f"data:image/webp;base64,{content}",
        "width": image.width,
        "height": image.height,
        "is_small": max(image.size) < PIXELS,
    }


def _sha256(script: str) -> str:
    """What a content security policy calls a script that it lets run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
