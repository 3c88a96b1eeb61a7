"""The judge's pass over image candidates, and the scores that its answers make."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from math import isfinite, nan

import torch
from PIL import Image
from tqdm import tqdm

from data_builders.engine.blocks import Images
from data_builders.engine.passes import ModelPass
from data_builders.engine.reasons import SCORE_NOT_FINITE
from data_builders.engine.stages import Record, batched, is_valid, mark_invalid
from data_builders.images.config import BuilderConfig
from prefopt import pocket
from prefopt.detectors import Box
from prefopt.diffusion.discriminator import load_discriminator
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.judges.loading import lazy_judge
from prefopt.judges.questions import Answer, Case, Judge, Question
from prefopt.judges.reward import DISCRIMINATOR, reward_type
from prefopt.judges.rubric import Rubric
from prefopt.ledger import Ledger
from prefopt.loading import Lazy

EMPTY = "empty"  # stands for the pixels' hash of the empty image
GREY = (128, 128, 128)
FORMATS = ("WEBP", "PPM")  # in which blocks hold images; trying all takes three times as long


def judge_of(config: BuilderConfig, rubric: Rubric, device: torch.device) -> Lazy[Judge]:
    """The judge that the options name."""
    return lazy_judge(
        str(config.judge_model_name_or_path),
        config.judge_revision,
        rubric=rubric,
        url=config.judge_url,
        dtype=getattr(torch, config.judge_dtype),
        device=device,
        batch_size=config.judge_batch_size,
    )


def discriminating_judge(config: BuilderConfig, device: torch.device) -> Lazy[Judge] | None:
    """The discriminator that ranks beside the judge, if the options name one."""
    if config.discriminator_name_or_path is None:
        return None
    name = pocket.resolve(config.discriminator_name_or_path, "discriminator")
    if reward_type(name, config.discriminator_revision) != DISCRIMINATOR:
        load_discriminator(name, revision=config.discriminator_revision)  # says what is wrong with it
    return lazy_judge(name, config.discriminator_revision, device=device, batch_size=config.judge_batch_size)


class JudgeImages(ModelPass[Judge]):
    """Asks a judge the rubric's questions about every candidate, and about an empty image of each prompt."""

    unit = "image"

    def __init__(
        self,
        judge: Lazy[Judge],
        rubric: Rubric,
        images: Images,
        ledger: Ledger,
        *,
        batch_size: int,
        calibrate: bool,
        name: str = "judging",
    ):
        super().__init__(judge)
        self.name = name
        self.rubric, self.images, self.ledger = rubric, images, ledger
        self.batch_size, self.calibrate = batch_size, calibrate
        if rubric.needs_class and not images.have_classes:
            raise InputError(
                f"the rubric {rubric.name} asks about {{class}}, and the prompts have no classes"
            )

    def todo(self, block: int) -> int:
        """The images of a block with a question that has no answer."""
        return sum(map(len, self._missing(self.images.rows(block, images=False))))

    def work(self, block: int, bar: tqdm) -> None:
        """Ask what has no answer, batch by batch."""
        for batch in self._missing(self.images.rows(block)):
            cases = [Case(open_row(row), row["prompt"], tuple(questions)) for row, questions in batch]
            answers = self.model.answer(cases)
            self.calls += sum(len(case.questions) for case in cases)
            self.ledger.add(
                {
                    self.key(row, question): _entry(answer)
                    for (row, questions), found in zip(batch, answers, strict=True)
                    for question, answer in zip(questions, found, strict=True)
                }
            )
            bar.update(len(batch))

    def answers(self, row: Record) -> dict[str, Answer] | None:
        """The kept answers about a candidate, by question; None if one of them is no finite number."""
        entries = {q.name: self.ledger[self.key(row, q)] for q in self._questions(row)}
        if any(entry is None for entry in entries.values()):
            return None
        return {name: Answer(**entry) for name, entry in entries.items()}

    def soft_score(self, row: Record) -> float:
        """The soft score of the kept answers about an image; nan if one of them is no finite number."""
        answers = self.answers(row)
        return nan if answers is None else sum(self.rubric.soft_points(answers).values())

    def key(self, row: Record, question: Question) -> str:
        """A hash of all that an answer depends on."""
        asked = [question.type, question.text, question.options]
        return content_key(json.dumps([self.identity, row["pixels_sha256"], row["prompt"], *asked]))

    def scored(self, row: Record, checks: dict[str, Answer], boxes: list[Box]) -> Record:
        """A valid row with its answers (the detector's `checks` among them), points and scores.

        A score that is not finite makes the row invalid.
        """
        answers = self.answers(row)
        empty = self.answers(empty_image(row)) if self.calibrate else {}
        if answers is None or empty is None:
            return mark_invalid(row, SCORE_NOT_FINITE)
        answers |= checks
        verdicts = {name: answer.verdict for name, answer in answers.items()}
        points = self.rubric.points(verdicts)
        soft_score = sum(self.rubric.soft_points(answers, empty).values())
        if not isfinite(soft_score):
            return mark_invalid(row, SCORE_NOT_FINITE)
        names = row["questions"]
        return row | {
            "verdicts": [verdicts[name] or "" for name in names],
            "log_odds": [answers[name].log_odds for name in names],
            "empty_log_odds": [empty[name].log_odds if name in empty else 0.0 for name in names],
            "other_mass": [answers[name].other_mass for name in names],
            "points": [points[name] for name in names],
            "hard_score": sum(points.values()),
            "soft_score": soft_score,
            "judge_score": soft_score,
            "boxes": [box._asdict() for box in boxes],
            "confidence": max((box.confidence for box in boxes), default=0.0),
        }

    def _questions(self, row: Record) -> tuple[Question, ...]:
        return self.rubric.questions(row["class"], row["prompt"])

    def _missing(self, rows: list[Record]) -> list[list[tuple[Record, list[Question]]]]:
        """Batches of images with their questions that have no answer; finished batches are left out."""
        batches = []
        for batch in batched(self._to_judge(rows), self.batch_size):
            asked = [
                (row, [q for q in self._questions(row) if self.key(row, q) not in self.ledger])
                for row in batch
            ]
            if asked := [(row, questions) for row, questions in asked if questions]:
                batches.append(asked)
        return batches

    def _to_judge(self, rows: Iterable[Record]) -> Iterator[Record]:
        """The valid images, equal pixels once; before a prompt's first, its empty image."""
        seen = set()
        for row in rows:
            if not is_valid(row):
                continue
            for image in ([empty_image(row)] if self.calibrate else []) + [row]:
                if (image["prompt_id"], image["pixels_sha256"]) not in seen:
                    seen.add((image["prompt_id"], image["pixels_sha256"]))
                    yield image


def empty_image(row: Record) -> Record:
    """A plain grey image in a candidate's place: a judge's answers about it are its answers about nothing."""
    size = f"{row['width']} x {row['height']}"
    return row | {"image": None, "pixels_sha256": f"{EMPTY} {size}"}


def open_row(row: Record) -> Image.Image:
    """The picture of a row; of one without, an empty image of its size."""
    if row["image"] is None:
        return Image.new("RGB", (row["width"], row["height"]), GREY)
    return Image.open(io.BytesIO(row["image"]["bytes"]), formats=FORMATS).convert("RGB")


def _entry(answer: Answer) -> dict | None:
    """An answer as JSON; None if it has a probability that is no finite number."""
    return asdict(answer) if all(map(isfinite, answer.probabilities.values())) else None
