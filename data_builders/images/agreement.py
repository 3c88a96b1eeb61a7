"""On which pairs of a table judges agree with its labels: the images they score, their votes, and the result.

The judges' passes are those of the builders of images; what they judge comes from a table of preferences.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from math import isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
from accelerate import PartialState
from scipy.special import expit

from data_builders.engine.blocks import Images
from data_builders.engine.passes import run_passes
from data_builders.engine.stages import Group, Record
from data_builders.engine.tables import CONSENSUS
from data_builders.export.card import Card, plain, public_words, write_about
from data_builders.export.hub import push
from data_builders.export.summary import reasons
from data_builders.export.tables import Export
from data_builders.export.writers import write_exports
from data_builders.images.judging import JudgeImages
from prefopt.diffusion.tables import Table
from prefopt.errors import InputError
from prefopt.evaluation.stats import win_rate
from prefopt.evaluation.words import percent
from prefopt.files import content_key, public_name
from prefopt.images import open_image
from prefopt.judges.questions import Judge
from prefopt.judges.rubric import Rubric
from prefopt.ledger import Ledger
from prefopt.loading import Lazy
from prefopt.runs import versions

DISAGREE = "judges disagree"
PREFER_REJECTED = "judges prefer the rejected"
NOT_FINITE = "not finite"


class TableImages(Images):
    """The images of a table in blocks of `block_size`, each image of a prompt once, where it comes first."""

    def __init__(self, table: Table, block_size: int):
        self.table, self.block_size = table, block_size
        first: dict[tuple[str, str], tuple[int, int]] = {}
        columns = zip(table.column("prompt"), table.column("sha256"), strict=True)
        for index, (prompt, hashes) in enumerate(columns):
            for place, sha256 in enumerate(hashes):
                first.setdefault((prompt, sha256), (index, place))
        self.first = list(first.items())

    @property
    def have_classes(self) -> bool:
        """A table's prompts have no classes."""
        return False

    def __len__(self) -> int:
        """How many blocks there are."""
        return -(-len(self.first) // self.block_size)

    def rows(self, block: int, *, images: bool = True) -> list[Record]:
        """The images of a block as judges read them; one that cannot be decoded is an InputError."""
        part = self.first[block * self.block_size : (block + 1) * self.block_size]
        rows = [image_row(prompt, sha256) for (prompt, sha256), _ in part]
        if images:
            for row, (_, place) in zip(rows, part, strict=True):
                row["image"] = {"bytes": self._decoded(*place), "path": None}
        return rows

    def _decoded(self, index: int, place: int) -> bytes:
        # Uncompressed: the judges' pass opens it again, and would not turn it upright or scale 16-bit grey.
        file = io.BytesIO()
        open_image(*self.table.image(index, place)).save(file, "PPM")
        return file.getvalue()


def image_row(prompt: str, sha256: str) -> Record:
    """An image of a table as the record by which a judge's answers are kept."""
    return {"prompt": prompt, "prompt_id": content_key(prompt), "class": "", "pixels_sha256": sha256}


class Rule(NamedTuple):
    """Which pairs are kept, and what their soft label is."""

    min_agreement: float = 1.0  # share of the judges that prefer the chosen image
    p_chosen: Literal["votes", "margin"] = "votes"


class Decision(NamedTuple):
    """What the judges make of a pair."""

    votes: tuple[float, ...]  # of each judge: 1 for the chosen image, 0 for the rejected one, 0.5 a tie
    agreement: float  # their mean
    p_chosen: float
    reason: str  # why the pair is left out; empty if it is kept


def decide(chosen: Sequence[float], rejected: Sequence[float], label: float | None, rule: Rule) -> Decision:
    """Decide on a pair by the scores (judges,) of its two images; `label` is its own p_chosen, if it has one.

    With a `min_agreement` above 0.5 a pair whose p_chosen is below 0.5 is left out, too: where most judges
    prefer the chosen image by little and one prefers the rejected by far, votes and margins say two things.
    """
    if not all(map(isfinite, (*chosen, *rejected))):
        return Decision((), nan, nan, NOT_FINITE)
    gaps = np.subtract(chosen, rejected)
    votes = tuple(((np.sign(gaps) + 1) / 2).tolist())
    agreement = sum(votes) / len(votes)
    voters = votes if label is None else (*votes, label)
    p_chosen = sum(voters) / len(voters) if rule.p_chosen == "votes" else float(expit(gaps).mean())
    reason = ""
    if agreement < rule.min_agreement:
        reason = PREFER_REJECTED if agreement < 0.5 else DISAGREE
    elif p_chosen < 0.5 < rule.min_agreement:
        reason = PREFER_REJECTED
    return Decision(votes, agreement, p_chosen, reason)


class Summary:
    """Counts over the pairs themselves, so a build that was resumed counts the same."""

    def __init__(self, table: Table, judges: Sequence[str]):
        self.table, self.judges = table, judges
        self.kept = 0
        self.dropped: Counter[str] = Counter()  # pairs, by reason
        self.votes: list[tuple[float, ...]] = []  # of each pair that every judge gave finite scores

    def add(self, decision: Decision) -> None:
        """Count one pair."""
        if decision.votes:
            self.votes.append(decision.votes)
        if decision.reason:
            self.dropped[decision.reason] += 1
        else:
            self.kept += 1

    def figures(self) -> dict[str, Any]:
        """The figures as BUILD.json holds them; those of judges are empty if no pair has finite scores.

        A judge's interval is Wilson's, which takes pairs for independent: of ranked lists it is too narrow.
        Two judges of which one has a tie agree by half.
        """
        votes = np.asarray(self.votes, dtype=np.float64).reshape(-1, len(self.judges))
        of_judge = dict(zip(self.judges, votes.T, strict=True)) if len(votes) else {}
        even = np.full(len(votes), 0.5)
        return {
            "examples": len(self.table),
            "pairs": self.kept + self.dropped.total(),
            "kept": self.kept,
            "judged": len(votes),
            "agreement_with_label": {
                name: asdict(win_rate(of, even, tie=0.0)) for name, of in of_judge.items()
            },
            "agreement_between_judges": [
                {"judges": [one, other], "agreement": float(1 - np.abs(of_one - of_other).mean())}
                for (one, of_one), (other, of_other) in combinations(of_judge.items(), 2)
            ],
        }

    def facts(self) -> dict[str, str]:
        """A few lines for the terminal and the card."""
        figures, table = self.figures(), self.table
        return {
            "examples": f"{len(table)} (dropped while reading: {reasons(table.dropped)})",
            "pairs": f"{figures['pairs']}, {self.kept} kept (dropped: {reasons(self.dropped)})",
            **{
                f"{name} agrees with the label": _in_words(found)
                for name, found in figures["agreement_with_label"].items()
            },
            **{
                f"{' and '.join(pair['judges'])} agree": percent(pair["agreement"])
                for pair in figures["agreement_between_judges"]
            },
        }


def _in_words(found: Mapping[str, Any]) -> str:
    """`90.0 % of 40 decided pairs (95 % interval 76.9 to 96.0), 2 ties`."""
    if found["rate_without_ties"] is None:
        return f"{found['ties']} ties alone"
    return (
        f"{percent(found['rate_without_ties'])} of {found['wins'] + found['losses']} decided pairs "
        f"(95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f}), {found['ties']} ties"
    )


class Consensus:
    """The passes of all judges over a table's images, and the pairs that their scores keep.

    `judges` are by name, each with its rubric; two that are the same model with the same questions are an
    InputError. `settings` are the builder's options, for BUILD.json.
    """

    def __init__(
        self,
        table: Table,
        judges: Mapping[str, tuple[Lazy[Judge], Rubric]],
        rule: Rule,
        settings: Mapping[str, Any],
        state: PartialState,
    ):
        self.table, self.rule, self.settings, self.state = table, rule, settings, state
        self.folder, self.summary = Path(settings["output_dir"]), Summary(table, list(judges))
        images = TableImages(table, settings["block_size"])
        self.blocks, size = len(images), settings["judge_batch_size"]
        self.ledger = Ledger(self.folder / "work", "answers", state.process_index)
        self.passes: list[JudgeImages] = []
        names: dict[tuple, str] = {}
        for name, (judge, rubric) in judges.items():
            if (other := names.setdefault((judge.identity, rubric.items), name)) != name:
                raise InputError(
                    f"--judges {other!r} and {name!r} are one model with the same questions; its vote would "
                    "be counted twice; leave one out"
                )
            settings = {"batch_size": size, "calibrate": False, "name": f"judging with {name}"}
            self.passes.append(JudgeImages(judge, rubric, images, self.ledger, **settings))

    def run(self) -> str:
        """Compute what is missing, each process its share; then write everything. A sentence about it.

        If no pair is kept, an InputError; nothing that was computed is lost.
        """
        start, said = perf_counter(), ""
        calls = run_passes(self.passes, self.blocks, self.state, keep_resident=False)
        if self.state.is_main_process:
            made = sum((Counter(of_one) for of_one in calls), Counter[str]())
            said = self._write(
                {
                    "processes": self.state.num_processes,
                    "seconds": round(perf_counter() - start, 1),
                    "calls": {each.name: made[each.name] for each in self.passes},
                }
            )
        self.state.wait_for_everyone()
        return said

    def _write(self, run: Mapping[str, Any]) -> str:
        """From the kept answers to the table and the card; on one process."""
        self.ledger.refresh()
        folder, summary = self.folder, self.summary
        export = Export("pairs on which the judges agree", CONSENSUS, lambda group: group.candidates)
        limit = self.settings["shard_megabytes"] * 2**20
        write_exports(self._kept(), folder, {"pairs": export}, test_fraction=0.0, max_bytes=limit)
        facts = summary.facts()
        build = {
            "facts": facts,
            "figures": summary.figures(),
            "rows": {"pairs": {"train": summary.kept}},
            "dropped": {"reading": dict(self.table.dropped), "pairs": dict(sorted(summary.dropped.items()))},
            "run": run,
            "settings": self.settings,
            "identity": {each.name: each.identity for each in self.passes},
            "versions": versions(),
        }
        judges = list(map(public_words, summary.judges))
        card = Card(
            title=f"Pairs of {public_name(self.table.source)} on which judges agree with the labels",
            about=ABOUT.format(judges=", ".join(map(plain, judges)), **self.rule._asdict()),
            facts=facts,
            models={f"judge {number}": judge for number, judge in enumerate(judges, start=1)},
            tables={"pairs": export.about},
            rows={"pairs": {"train": summary.kept}},
            tasks=["text-to-image"],
            license=self.settings["license"],
            questions={
                f"What judge {number} was asked": judge.rubric.as_yaml()
                for number, judge in enumerate(self.passes, start=1)
            },
        )
        write_about(folder, build, card)
        said = f"{folder}: " + "; ".join(f"{name}: {fact}" for name, fact in facts.items())
        if not summary.kept:
            raise InputError(f"no pair is left in {said}. Lower --min_agreement, or name other --judges")
        if self.settings["push_to_hub"]:
            push(folder, self.settings["push_to_hub"])
        return said

    def _kept(self) -> Iterator[Group]:
        """The rows of the pairs that are kept, in the order of the source; the summary counts all pairs."""
        columns = map(self.table.column, ("prompt", "rows", "sha256", "ranks", "p_chosen"))
        for index, (prompt, rows, hashes, ranks, label) in enumerate(zip(*columns, strict=True)):
            images = [image_row(prompt, sha256) for sha256 in hashes]
            scores = [[judge.soft_score(image) for judge in self.passes] for image in images]
            for better, worse in combinations(range(len(ranks)), 2):
                if ranks[better] == ranks[worse]:
                    continue
                decision = decide(scores[better], scores[worse], label, self.rule)
                self.summary.add(decision)
                if not decision.reason:
                    row = {"prompt": prompt, "prompt_id": content_key(prompt), **decision._asdict()}
                    for side, place in (("chosen", better), ("rejected", worse)):
                        row[side] = {"bytes": self.table.image(index, place)[0], "path": None}
                        row |= {f"{side}_scores": scores[place], f"{side}_row": rows[place]}
                    yield Group([row], [], [])


ABOUT = """The judges, in the order of `chosen_scores` and `rejected_scores`: {judges}. Kept are pairs of
which the share of judges that prefer the chosen image, a tie being half a vote, is at least
{min_agreement:g}. `p_chosen` is from the judges' {p_chosen}."""
