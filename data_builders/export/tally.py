"""The questions of a rubric in words, and how they were answered about all images and about the used ones."""

from collections import Counter, defaultdict
from collections.abc import Collection
from math import isfinite

from scipy.special import expit

from data_builders.engine.stages import Group, Record
from prefopt.evaluation.words import PERCENT, signed
from prefopt.judges.questions import NO, YES, Answer
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


def soft_points(rubric: Rubric, row: Record) -> dict[str, float]:
    """A judged candidate's soft points, by question; their sum is the judge's score."""
    answers, empty = (
        {
            name: Answer({YES: float(expit(d)), NO: float(expit(-d))}, other)
            for name, d, other in zip(row["questions"], row[column], row["other_mass"], strict=True)
        }
        for column in ("log_odds", "empty_log_odds")
    )
    return rubric.soft_points(answers, empty)


class Tally:
    """How often each question was answered yes, no or unclear, and how much it made of the pairs' margins."""

    def __init__(self, rubric: Rubric):
        self.rubric = rubric
        self.images = Counter[str]()  # judged ones, by side; an image of two pairs counts in both
        self.verdicts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by side and question
        self.gaps: dict[str, float] = dict.fromkeys((item.name for item in rubric.items), 0.0)

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
            self._add("chosen", chosen)
            self._add("rejected", rejected)
            better, worse = soft_points(self.rubric, chosen), soft_points(self.rubric, rejected)
            self.gaps = {name: gap + better[name] - worse[name] for name, gap in self.gaps.items()}

    def shares(self) -> dict[str, float]:
        """How much each question made of the difference in the judge's score between the images of the pairs.

        The shares sum to 1; empty if there is no difference, or one that is no finite number.
        """
        total = sum(self.gaps.values())
        return {name: gap / total for name, gap in self.gaps.items()} if total and isfinite(total) else {}

    def rows(self, classes: Collection[str]) -> list[Record]:
        """A line for each question, shares in words; of a build of one class, its name is in the text."""
        class_name = next(iter(classes)) if len(classes) == 1 else "{class}"
        shares = self.shares()
        return [
            {
                "name": item.name.replace("_", " "),
                "text": fill(item, class_name, "{prompt}"),
                "good": YES if item.sign > 0 else NO,
                "weight": f"{item.weight:g}",
                "needs": [need.replace("_", " ") for need in item.needs],
                "yes": {side: self._share(side, item.name, YES) for side in SIDES},
                "unclear": self._share("all", item.name, ""),
                "share": signed(f"{100 * shares[item.name]:.1f}{PERCENT}") if shares else "",
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
