"""How often a self-critique was right, where the pocket's questions know the answer.

    python scripts/studies/critique.py runs/demo-vlm/critique

Of the answers that a build compared it prints how many are right; and of the comparisons of a right answer
with a wrong one, how often the critic preferred the right one: over both orders of the two, where the orders
agree and where they do not, and among those that it did not abstain from. A study may know the truth; no
builder may.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from data_builders.engine.stages import by_prompt
from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.pocket.questions import is_right


@dataclass(frozen=True)
class Comparison:
    """A right answer and a wrong one to the same question."""

    p_right: float  # how likely the right one is the better, by the critic, over both orders
    consistent: bool  # the orders agree


def comparisons(rows: list[dict[str, Any]]) -> list[Comparison]:
    """Of a build's candidates, all that the critic compared of which one is right."""
    found = []
    for answers in by_prompt(rows):
        by_number = {row["candidate"]: row for row in answers}
        for one, other in combinations(sorted(by_number), 2):
            first, second = by_number[one], by_number[other]
            if other not in (first["compared_with"] or ()) or right(first) == right(second):
                continue
            place = first["compared_with"].index(other)
            p = first["p_better"][place]
            found.append(Comparison(p if right(first) else 1 - p, first["consistent"][place]))
    return found


def right(row: dict[str, Any]) -> bool:
    """Whether an answer is the right one."""
    return is_right({"completion": [{"content": row["reference"]}]}, row["answer"])


def rate(p_right: list[float]) -> str:
    """How often the right answer was preferred, a tie being one half, with a 95 % interval (Wilson)."""
    if not p_right:
        return "nothing to compare"
    wins = sum(0.5 if p == 0.5 else float(p > 0.5) for p in p_right)
    interval = binomtest(round(wins), len(p_right)).proportion_ci(method="wilson")
    share, low, high = (words.percent(value) for value in (wins / len(p_right), *interval))
    return f"{share} ({low} to {high}) of {len(p_right)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="the folder of a self-critique of the pocket's questions")
    build = parser.parse_args().build
    settings = json.loads((build / "BUILD.json").read_text(encoding="utf-8"))["settings"]
    rows = [
        row
        for path in sorted((build / "candidates").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    if not rows or any(row["reference"] is None for row in rows):
        raise InputError(f"{build} has no candidates whose right answers are known")
    usable = [row for row in rows if not row["invalid_reason"]]
    found, margin = comparisons(rows), settings["margin"]
    kept = [one for one in found if abs(one.p_right - 0.5) >= margin]
    table = Table("comparisons of a right answer with a wrong one", "the critic preferred the right one")
    table.add_row("all, over both orders", rate([one.p_right for one in found]))
    table.add_row("the orders agree", rate([one.p_right for one in found if one.consistent]))
    table.add_row("the orders disagree", rate([one.p_right for one in found if not one.consistent]))
    table.add_row(f"not abstained from (margin {margin:g})", rate([one.p_right for one in kept]))
    share = sum(map(right, usable)) / len(usable)
    Console().print(f"{len(usable)} answers, {words.percent(share)} right", table, sep="\n")


if __name__ == "__main__":
    main()
