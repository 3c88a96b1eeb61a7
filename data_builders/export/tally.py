"""The questions of a rubric in words, and how they were answered about all images and about the used ones."""

from collections import Counter, defaultdict
from collections.abc import Collection

from data_builders.engine.stages import Group, Record
from prefopt.evaluation.words import PERCENT
from prefopt.judges.questions import NO, YES
from prefopt.judges.rubric import Item, Rubric

# What a detector is asked, by the check.
CHECKS = {
    "presence": "Does the detector find a {class}?",
    "count": "Does the detector find as many of the class as the description asks for?",
    "colour": "Does what the detector finds have the colour that the description asks for?",
}
SIDES = ("all", "selected", "chosen", "rejected")


def fill(item: Item, class_name: str, prompt: str) -> str:
    """An item's question about an image of this class, made for this prompt."""
    text = CHECKS[item.check] if item.check else item.text
    return text.replace("{class}", class_name).replace("{prompt}", prompt)


class Tally:
    """How often each question was answered yes, no or unclear, and in how many pairs it favours a side."""

    def __init__(self, rubric: Rubric):
        self.rubric = rubric
        self.images = Counter[str]()  # judged ones, by side; an image of two pairs counts in both
        self.pairs = 0
        self.verdicts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by side and question
        self.favours: dict[str, Counter[str]] = defaultdict(Counter)  # by question; the better side of pairs

    @property
    def judged(self) -> int:
        """The images that have answers."""
        return self.images["all"]

    def add(self, group: Group) -> None:
        """Count one prompt."""
        for row in group.candidates:
            self._add("all", row)
            if row["selected"]:
                self._add("selected", row)
        for chosen, rejected, _ in group.pairs:
            self.pairs += 1
            self._add("chosen", chosen)
            self._add("rejected", rejected)
            for name, good, bad in zip(
                chosen["questions"], chosen["points"], rejected["points"], strict=True
            ):
                self.favours[name]["chosen" if good > bad else "rejected" if good < bad else "neither"] += 1

    def rows(self, classes: Collection[str]) -> list[Record]:
        """A line for each question, shares in words; of a build of one class, its name is in the text."""
        class_name = next(iter(classes)) if len(classes) == 1 else "{class}"
        return [
            {
                "name": item.name.replace("_", " "),
                "text": fill(item, class_name, "{prompt}"),
                "good": YES if item.sign > 0 else NO,
                "weight": f"{item.weight:g}",
                "needs": [need.replace("_", " ") for need in item.needs],
                "yes": {side: self._share(side, item.name, YES) for side in SIDES},
                "unclear": self._share("all", item.name, ""),
                "favours": {
                    side: _percent(self.favours[item.name][side], self.pairs)
                    for side in ("chosen", "rejected")
                },
            }
            for item in self.rubric.items
        ]

    def _add(self, side: str, row: Record) -> None:
        if row.get("verdicts"):
            self.images[side] += 1
            for name, verdict in zip(row["questions"], row["verdicts"], strict=True):
                self.verdicts[side, name][verdict] += 1

    def _share(self, side: str, name: str, verdict: str) -> str:
        return _percent(self.verdicts[side, name][verdict], self.images[side])


def _percent(count: int, total: int) -> str:
    """`62.5 %`; empty of nothing."""
    return f"{100 * count / total:.1f}{PERCENT}" if total else ""
