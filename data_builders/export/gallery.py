"""gallery.html: the images of a build, how each was judged, and what became of it.

The page needs nothing beside itself. It holds small copies of a bounded number of images: which prompts of a
larger build are shown follows from the hashes of their texts, so every class has its share. What it says of
the questions is counted over all images.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_builders.engine.reasons import SENTENCES
from data_builders.engine.stages import Group, Record
from data_builders.export.candidate import margins_in_words, place_in_words, shown_candidate
from data_builders.export.pages import spread, write_page
from data_builders.export.tally import Tally
from prefopt.judges.rubric import Rubric

# How candidates can be told apart on the page, and what each is called there.
STATUSES = {
    "selected": "selected",
    "chosen": "chosen in a pair",
    "rejected": "rejected in a pair",
    "unpaired": "in no pair",
    "not-selected": "not selected",
    "invalid": "invalid",
}


class Gallery:
    """The page of a build: prompts are added one after the other, and at the end it is written.

    Of each prompt only copies of its images stay in memory, at most `thumbnail` pixels wide and high. The
    page shows the prompts of at most `limit` images (but one prompt at least), and says how many it leaves
    out.
    """

    def __init__(self, rubric: Rubric, *, thumbnail: int = 384, limit: int = 1000):
        self.tally, self.thumbnail, self.limit = Tally(rubric), thumbnail, limit
        self.total = self.candidates = self.pairs = 0
        self.selected = 0  # prompts with a selected image
        self.classes, self.judges, self.discriminators = set[str](), set[str](), set[str]()
        self.is_calibrated = False  # whether any answer about an empty image counts
        self._images = 0  # of the prompts on the heap
        # The largest hash on top; the place decides between equals.
        self._heap: list[tuple[int, int, int, Record]] = []

    def add(self, group: Group) -> None:
        """Take a prompt's candidates, with the columns of `CANDIDATES`, and its pairs."""
        self.tally.add(group)
        self._count(group)
        first = group.candidates[0]
        self._images += len(group.candidates)
        prompt: Record = {}  # filled once it is known to be among the smallest
        entry = (-int(first["prompt_id"][:16], 16), -self.total, len(group.candidates), prompt)
        heapq.heappush(self._heap, entry)
        is_shown = True
        while self._images > self.limit and len(self._heap) > 1:
            *_, size, left_out = heapq.heappop(self._heap)
            self._images -= size
            is_shown &= left_out is not prompt
        if is_shown:
            prompt |= _prompt(group, self.tally.rubric, self.thumbnail)

    @property
    def prompts(self) -> list[Record]:
        """The prompts whose hashes are the smallest, of `limit` images at most, in the order of the build."""
        return [prompt for *_, prompt in sorted(self._heap, key=lambda entry: -entry[1])]

    def write(self, output: Path, *, selection: str, facts: Mapping[str, str]) -> Path:
        """Write gallery.html in a folder; its path. `selection` says in words which images are selected."""
        prompts = self.prompts
        candidates = [candidate for prompt in prompts for candidate in prompt["candidates"]]
        return write_page(
            output / "gallery.html",
            "export/gallery.html.jinja",
            title=": ".join(filter(None, ["Judged images", ", ".join(sorted(self.classes))])),
            facts=facts,
            shown=self,
            selection=selection,
            rubric=self.tally.rubric,
            questions=self.tally.rows(self.classes),
            judged=self.tally.judged,
            has_margins=any("widest" in prompt for prompt in prompts),
            has_boxes=any(candidate["boxes"] for candidate in candidates),
            images=len(candidates),
            classes=Counter(prompt["class"] for prompt in prompts if prompt["class"]),
            statuses=_statuses(candidates, self.pairs),
            reasons=_reasons(candidates),
            sentences=SENTENCES,
            answered=_answered(candidates, self.tally.rubric),
        )

    def _count(self, group: Group) -> None:
        rows = group.candidates
        self.total += 1
        self.candidates += len(rows)
        self.selected += any(row["selected"] for row in rows)
        self.pairs += len(group.pairs)
        self.classes |= {rows[0]["class"] or ""} - {""}
        for row in rows:
            self.judges |= {row.get("judge") or ""} - {""}
            self.discriminators |= {row.get("discriminator") or ""} - {""}
            self.is_calibrated |= any(row.get("empty_log_odds") or ())


def write_gallery(
    output: Path,
    groups: Iterable[Group],
    rubric: Rubric,
    *,
    selection: str,
    facts: Mapping[str, str],
    **limits: int,
) -> Path:
    """Write the gallery of these prompts; `limits` are those of `Gallery`."""
    gallery = Gallery(rubric, **limits)
    for group in groups:
        gallery.add(group)
    return gallery.write(output, selection=selection, facts=facts)


def _prompt(group: Group, rubric: Rubric, thumbnail: int) -> Record:
    """One prompt as the template shows it: candidates by rank, those without a rank last."""
    rows = group.candidates
    ranks = Counter(record["rank"] for record in rows)
    ordered = sorted(rows, key=lambda r: (r["rank"] is None, r["rank"] or 0, r["candidate"]))
    margins = [pair.margin for pair in group.pairs]
    shown = {
        "text": rows[0]["prompt"],
        "class": rows[0]["class"] or "",
        "has_selected": any(record["selected"] for record in rows),
        "pairs": _pairs_in_words(margins),
        "candidates": [
            shown_candidate(record, group.pairs, rubric, thumbnail)
            | {"place": place_in_words(record["rank"], ranks[record["rank"]] > 1, len(group.ranked))}
            for record in ordered
        ],
    }
    return shown | spread(margins)


def _pairs_in_words(margins: list[float]) -> str:
    """`4 pairs, margins 0.80 to 3.21`."""
    if not margins:
        return "no pair"
    many = "s" if len(margins) > 1 else ""
    return f"{len(margins)} pair{many}, margin{many} {margins_in_words(margins)}"


def _statuses(candidates: list[Record], pairs: int) -> dict[str, tuple[str, int]]:
    """What images can be filtered by: what it is called, and how many shown images have it."""
    counts = Counter(status for candidate in candidates for status in candidate["statuses"])
    if not pairs:
        del counts["unpaired"]
    return {name: (told, counts[name]) for name, told in STATUSES.items() if counts[name]}


def _reasons(candidates: list[Record]) -> dict[tuple[bool, str], tuple[str, int]]:
    """Of every reason why an image is invalid or not selected: its name as a filter, and how many have it."""
    counts = Counter((c["is_invalid"], c["reason"]) for c in candidates if c["reason"])
    return {reason: (f"reason-{place}", count) for place, (reason, count) in enumerate(counts.most_common())}


def _answered(candidates: list[Record], rubric: Rubric) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """Of each question the answers that shown images got: a filter's value, the answer, and how many did."""
    said = {"y": "yes", "n": "no", "u": "unclear"}
    found = []
    for place, item in enumerate(rubric.items):
        counts = Counter(candidate["letters"][place] for candidate in candidates)
        given = [
            (f"{place}{letter}", told, counts[letter]) for letter, told in said.items() if counts[letter]
        ]
        found.append((item.name.replace("_", " "), given))
    return found
