"""The tables that a build can export: a new one is one entry of EXPORTS.

Importing this imports no library of tables, so that `--exports` is checked at once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_builders.engine.stages import Group, Record
from data_builders.engine.tables import CANDIDATES, PAIRS, PICKAPIC, RANKED, SFT, Columns
from prefopt.files import content_key


@dataclass(frozen=True)
class Export:
    """A table: its columns, and the rows of a prompt; no columns: a folder of pictures with their texts."""

    about: str  # for the dataset card
    columns: Columns | None
    rows: Callable[[Group], Iterable[Record]]


def _selected(group: Group) -> list[Record]:
    return [row for row in group.candidates if row["selected"]]


def _pairs(group: Group) -> Iterator[Record]:
    for chosen, rejected, margin in group.pairs:
        yield {
            "prompt": chosen["prompt"],
            "chosen": chosen["image"],
            "rejected": rejected["image"],
            "margin": margin,
            "chosen_score": chosen["soft_score"],
            "rejected_score": rejected["soft_score"],
            "prompt_id": chosen["prompt_id"],
            "chosen_seed": chosen["seed"],
            "rejected_seed": rejected["seed"],
        }


def _ranked(group: Group) -> Iterator[Record]:
    if len(group.ranked) > 1:
        yield {
            "prompt": group.ranked[0]["prompt"],
            "images": [record["image"] for record in group.ranked],
            "ranks": [record["rank"] for record in group.ranked],
            "scores": [record["soft_score"] for record in group.ranked],
            "prompt_id": group.ranked[0]["prompt_id"],
        }


def _pickapic(group: Group) -> Iterator[Record]:
    for chosen, rejected, _ in group.pairs:
        # The winner's side follows from the images' hashes.
        order = content_key(chosen["pixels_sha256"] + rejected["pixels_sha256"])
        first = int(order[0], 16) < 8
        left, right = (chosen, rejected) if first else (rejected, chosen)
        yield {
            "jpg_0": left["image"]["bytes"],
            "jpg_1": right["image"]["bytes"],
            "label_0": float(first),
            "label_1": float(not first),
            "caption": chosen["prompt"],
        }


EVERYTHING = Export(
    "every image with its seed, answers, boxes, rank, and why it was not selected or is invalid",
    CANDIDATES,
    lambda group: group.candidates,
)
EXPORTS = {
    "sft": Export("the selected images, to imitate", SFT, _selected),
    "pairs": Export("a better and a worse image of one prompt", PAIRS, _pairs),
    "ranked": Export("all images of a prompt with their ranks", RANKED, _ranked),
    "pickapic": Export("the pairs in the columns of Pick-a-Pic", PICKAPIC, _pickapic),
    "imagefolder": Export("the selected images as files with a metadata.jsonl", None, _selected),
}
