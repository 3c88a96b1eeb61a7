"""How good a judge was, measured by the pocket's oracle, and what decided the pairs that came of it.

    python scripts/studies/pairs.py runs/demo/round-1/data

Of a build of the pocket's captions it prints, for each attribute: how many candidates show it right; how
often, of two candidates of a prompt of which one shows it right, the judge's soft score preferred that one;
and how often a pair's chosen image has it right and the rejected one wrong, and the other way round. Then how
much of the pairs' margin each question made, and in how many attributes the images of a pair differ. The
judge's agreement is also put in the header of the build's gallery. A study may ask the oracle, as a
comparison does; no builder may.
"""

import argparse
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_builders.engine.stages import Group, Pair, by_prompt
from data_builders.export.gallery import write_gallery
from data_builders.export.tally import Tally
from data_builders.images.selection import ranked
from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.evaluation.stats import pairwise_accuracy
from prefopt.judges.rubric import Rubric
from prefopt.pocket.oracle import Oracle
from prefopt.pocket.world import ATTRIBUTES

PARTS = (*ATTRIBUTES, "all")


class Judged:
    """The candidates of a build, what the oracle says of them, and the pairs."""

    def __init__(self, build: Path):
        self.about = json.loads((build / "BUILD.json").read_text(encoding="utf-8"))
        settings = self.about["settings"]
        self.rubric = Rubric.load(settings["rubric"]).weighed(settings["question_weights"])
        self.rows = _rows(build / "candidates")
        self.candidates = [row for row in self.rows if row["rank"] is not None]
        images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in self.candidates]
        self.prompts = [row["prompt"] for row in self.candidates]
        self.right = Oracle.load().correct(images, self.prompts)
        places = {(row["prompt_id"], row["seed"]): i for i, row in enumerate(self.candidates)}
        columns = ["prompt_id", "chosen_seed", "rejected_seed", "margin"]
        pairs = [tuple(row.values()) for row in _rows(build / "pairs", columns)]
        if not pairs:
            raise InputError(f"{build} holds no pairs: build it with --exports pairs")
        self.pairs = [
            (places[prompt, chosen], places[prompt, rejected]) for prompt, chosen, rejected, _ in pairs
        ]
        self.margins = [margin for *_, margin in pairs]

    def agreement(self, part: str) -> dict | None:
        """How often the judge prefers the one of two candidates that has this right, with an interval."""
        scores = [row["soft_score"] for row in self.candidates]
        found = pairwise_accuracy(scores, self.right[part], self.prompts)
        if found is None:
            return None
        rate, number = found
        return {"rate": rate.mean, "low": rate.low, "high": rate.high, "comparisons": number}

    def decided(self, part: str) -> tuple[float, float]:
        """The share of pairs in which only the chosen image has this right, and only the rejected one."""
        chosen, rejected = (self.right[part][list(side)] for side in zip(*self.pairs, strict=True))
        return float((chosen & ~rejected).mean()), float((rejected & ~chosen).mean())

    def shares(self) -> dict[str, float]:
        """How much of the pairs' mean margin each question made; of 1 in all."""
        tally = Tally(self.rubric)
        for group in self.groups():
            tally.add(group)
        return tally.shares()

    def groups(self) -> Iterator[Group]:
        """The candidates of each prompt with their pairs."""
        pairs = defaultdict(list)
        for (a, b), margin in zip(self.pairs, self.margins, strict=True):
            pair = Pair(self.candidates[a], self.candidates[b], margin)
            pairs[pair.chosen["prompt_id"]].append(pair)
        for rows in by_prompt(self.rows):
            yield Group(rows, ranked(rows), pairs[rows[0]["prompt_id"]])

    def differences(self) -> Counter[int]:
        """Pairs by the number of attributes that one image has right and the other has not."""
        return Counter(
            sum(int(self.right[name][a] != self.right[name][b]) for name in ATTRIBUTES) for a, b in self.pairs
        )


def _rows(folder: Path, columns: list[str] | None = None) -> list[dict]:
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def tables(judged: Judged) -> list[Table]:
    """What the judge knew by attribute, and what decided the pairs."""
    attributes = Table(
        "attribute", "right", "the judge agrees", "comparisons", "only chosen right", "only rejected"
    )
    for part in PARTS:
        found = judged.agreement(part)
        said = rate(found) if found else "nothing to compare"
        gains = [words.percent(share) for share in judged.decided(part)]
        right = words.percent(float(judged.right[part].mean()))
        attributes.add_row(part, right, said, str(found["comparisons"]) if found else "", *gains)
    questions = Table("question", "share of the pairs' margin")
    for name, share in judged.shares().items():
        questions.add_row(name, words.percent(share))
    differences = Table("attributes in which a pair differs", "pairs")
    for number, count in sorted(judged.differences().items()):
        differences.add_row(str(number), str(count))
    return [attributes, questions, differences]


def rate(found: dict) -> str:
    """An agreement in words: `83.4 % (78.8 % to 87.8 %)`."""
    low, high = (words.percent(found[end]) for end in ("low", "high"))
    return f"{words.percent(found['rate'])} ({low} to {high})"


def show_in_gallery(judged: Judged, build: Path) -> Path:
    """Write the build's gallery again, with the judge's agreement in its header."""
    worth = {part: found for part in PARTS if (found := judged.agreement(part))}
    said = "; ".join(f"{part} {rate(found)}" for part, found in worth.items())
    facts = judged.about["facts"] | {"the judge agrees with the oracle, by attribute": said}
    return write_gallery(
        build, judged.groups(), judged.rubric, selection=judged.about["selection"], facts=facts
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="a builder's --output_dir")
    build = parser.parse_args().build
    if not (build / "BUILD.json").is_file():
        parser.error(f"{build} is no build: it holds no BUILD.json; name a builder's --output_dir")
    try:
        judged = Judged(build)
    except InputError as error:
        parser.error(str(error))
    Console().print(*tables(judged), show_in_gallery(judged, build), sep="\n")


if __name__ == "__main__":
    main()
