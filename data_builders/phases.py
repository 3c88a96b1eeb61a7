"""The phases of a build: draw, ask, detect. Each holds one model and works on blocks of prompts.

A phase repeats nothing that is finished, whatever killed the run: images are kept in blocks, answers and
boxes in ledgers, by content. Calls of a model are batched within a block, so the batches, and with them the
last bits of the answers, are the same for any number of processes.
"""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from data_builders.blocks import Block, CandidatesTable
from data_builders.candidates import draw, encode, expand
from data_builders.sources import Source
from data_builders.stages import Record, batched, flow, kept, watched
from prefopt.detectors import Box, Detector
from prefopt.judges.questions import Answer, Case, Judge, Question
from prefopt.judges.rubric import Rubric
from prefopt.store import Ledger, content_key

EMPTY = "empty"  # stands for the pixels' hash of the empty image
GREY = (128, 128, 128)


class Phase(Protocol):
    """One model's part of a build."""

    name: str  # of no other phase
    unit: str
    identity: str  # of the model, with its settings
    calls: int  # of the model, in this run

    def todo(self, block: int) -> int:
        """How many units a block still needs."""
        ...

    def work(self, block: int, bar: tqdm) -> None:
        """Do what a block still needs, and keep it."""
        ...

    def release(self) -> None:
        """Let the model go."""
        ...


def run_phases(phases: Sequence[Phase], blocks: Sequence[int], *, keep_resident: bool, quiet: bool) -> None:
    """All phases over these blocks: one model after the other, or all loaded and block after block."""
    for together in [phases] if keep_resident else [[phase] for phase in phases]:
        # What a later phase has to do is known once an earlier one is done.
        totals = [None if keep_resident else sum(map(phase.todo, blocks)) for phase in together]
        bars = [
            tqdm(desc=phase.name, unit=phase.unit, total=total, disable=quiet or total == 0)
            for phase, total in zip(together, totals, strict=True)
        ]
        for block in blocks:
            for phase, bar in zip(together, bars, strict=True):
                if phase.todo(block):
                    phase.work(block, bar)
        for phase, bar in zip(together, bars, strict=True):
            bar.close()
            phase.release()


class _Loaded:
    """A model that is loaded when it is first needed."""

    def __init__(self, load: Callable[[], Any]):
        self._load, self._model, self.calls = load, None, 0

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Draw(_Loaded):
    """Draws the candidates of these numbers by one source, into a table of its own."""

    unit = "image"

    def __init__(
        self,
        name: str,
        source: Source,
        numbers: Iterable[int],
        table: CandidatesTable,
        seed: int,
        batch_size: int,
        device: Any,
    ):
        super().__init__(lambda: source.load(device))
        self.name, self.identity = name, content_key(json.dumps(table.identity, sort_keys=True))
        self.source, self.numbers, self.table = source, list(numbers), table
        self.seed, self.batch_size = seed, batch_size

    def todo(self, block: int) -> int:
        """The images of a block that is not written."""
        place = self.table.blocks[block]
        return 0 if place.file.exists() else len(place.prompts) * len(self.numbers)

    def work(self, block: int, bar: tqdm) -> None:
        """Draw the block and write it whole."""
        place: Block = self.table.blocks[block]
        stages = [
            expand(self.numbers, self.seed),
            draw(self.model, self.source.sampler, self.batch_size),
            encode(threads=4, ahead=2 * self.batch_size),
            watched(bar),
        ]
        rows = [{**row, "reject_reason": row.get("reject_reason", "")} for row in flow(place.prompts, stages)]
        self.calls += len(rows)
        self.table.write(place, rows)


class Drawn:
    """What all sources have drawn: the candidates of each prompt of a block, in their order."""

    def __init__(self, tables: Sequence[CandidatesTable]):
        self.tables = tables

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.tables[0].blocks)

    def rows(self, block: int, *, images: bool = True) -> list[Record]:
        """All rows of a block, prompt by prompt, with or without their images."""
        order = {p["prompt_id"]: place for place, p in enumerate(self.tables[0].blocks[block].prompts)}
        rows = [row for table in self.tables for row in table.rows(table.blocks[block], images=images)]
        return sorted(rows, key=lambda row: (order[row["prompt_id"]], row["candidate"]))


class Ask(_Loaded):
    """Asks a judge the rubric's questions about every candidate, and about an empty image of each prompt."""

    name, unit = "judging", "image"

    def __init__(
        self,
        load: Callable[[], Judge],
        rubric: Rubric,
        classes: Mapping[str, str],
        drawn: Drawn,
        ledger: Ledger,
        *,
        batch_size: int,
        calibrate: bool,
    ):
        super().__init__(load)
        self.rubric, self.classes, self.drawn, self.ledger = rubric, classes, drawn, ledger
        self.batch_size, self.calibrate = batch_size, calibrate
        self.identity = ""

    def todo(self, block: int) -> int:
        """The images of a block with a question that has no answer."""
        return sum(map(len, self._missing(self.drawn.rows(block, images=False))))

    def work(self, block: int, bar: tqdm) -> None:
        """Ask what has no answer, batch by batch."""
        for batch in self._missing(self.drawn.rows(block)):
            cases = [Case(opened(row), row["prompt"], tuple(questions)) for row, questions in batch]
            answers = self.model.answer(cases)
            self.calls += sum(len(case.questions) for case in cases)
            self.ledger.add(
                {
                    self.key(row, question): asdict(answer)
                    for (row, questions), found in zip(batch, answers, strict=True)
                    for question, answer in zip(questions, found, strict=True)
                }
            )
            bar.update(len(batch))

    def answers(self, row: Record) -> dict[str, Answer]:
        """The kept answers about a candidate, by question."""
        return {q.name: Answer(**self.ledger[self.key(row, q)]) for q in self._questions(row)}

    def key(self, row: Record, question: Question) -> str:
        """What an answer depends on."""
        self.identity = self.identity or self.model.identity
        facts = [
            self.identity,
            row["pixels_sha256"],
            row["prompt"],
            question.type,
            question.text,
            question.options,
        ]
        return content_key(json.dumps(facts))

    def _questions(self, row: Record) -> tuple[Question, ...]:
        return self.rubric.questions(self.classes[row["prompt_id"]], row["prompt"])

    def _missing(self, rows: list[Record]) -> list[list[tuple[Record, list[Question]]]]:
        """Batches of images with the questions that have no answer; a batch that has all is left out."""
        batches = []
        for batch in batched(self._images(rows), self.batch_size):
            asked = [
                (row, [q for q in self._questions(row) if self.key(row, q) not in self.ledger])
                for row in batch
            ]
            if asked := [(row, questions) for row, questions in asked if questions]:
                batches.append(asked)
        return batches

    def _images(self, rows: Iterable[Record]) -> Iterator[Record]:
        """What was not dropped, equal pixels once; before a prompt's first, its empty image."""
        seen = set()
        for row in rows:
            if not kept(row):
                continue
            for image in ([empty_image(row)] if self.calibrate else []) + [row]:
                if (image["prompt_id"], image["pixels_sha256"]) not in seen:
                    seen.add((image["prompt_id"], image["pixels_sha256"]))
                    yield image


def empty_image(row: Record) -> Record:
    """A plain grey image in a candidate's place: what a judge says of it, it says of nothing."""
    size = f"{row['width']} x {row['height']}"
    return row | {"image": None, "pixels_sha256": f"{EMPTY} {size}"}


class Detect(_Loaded):
    """Looks for its class in every candidate."""

    name, unit = "detecting", "image"

    def __init__(
        self,
        load: Callable[[], Detector],
        classes: Mapping[str, str],
        drawn: Drawn,
        ledger: Ledger,
        *,
        batch_size: int,
    ):
        super().__init__(load)
        self.classes, self.drawn, self.ledger, self.batch_size = classes, drawn, ledger, batch_size
        self.identity = ""

    def todo(self, block: int) -> int:
        """The images of a block whose boxes are not kept."""
        return sum(map(len, self._missing(self.drawn.rows(block, images=False))))

    def work(self, block: int, bar: tqdm) -> None:
        """Detect batch by batch."""
        for batch in self._missing(self.drawn.rows(block)):
            found = self.model.detect([opened(row) for row in batch], [[self._class(row)] for row in batch])
            self.calls += len(batch)
            plain = [[[box.label, *map(float, box[1:])] for box in boxes] for boxes in found]
            self.ledger.add({self.key(row): boxes for row, boxes in zip(batch, plain, strict=True)})
            bar.update(len(batch))

    def boxes(self, row: Record) -> list[Box]:
        """The kept boxes of a candidate, the most confident first."""
        return [Box(*box) for box in self.ledger[self.key(row)]]

    def key(self, row: Record) -> str:
        """What the boxes depend on."""
        self.identity = self.identity or self.model.identity
        return content_key(json.dumps([self.identity, row["pixels_sha256"], self._class(row)]))

    def _class(self, row: Record) -> str:
        return self.classes[row["prompt_id"]]

    def _missing(self, rows: list[Record]) -> list[list[Record]]:
        distinct = {self.key(row): row for row in rows if kept(row)}
        batches = [list(batch) for batch in batched(distinct.values(), self.batch_size)]
        return [batch for batch in batches if any(self.key(row) not in self.ledger for row in batch)]


def opened(row: Record) -> Image.Image:
    """The picture of a row; of one without, an empty image of its size."""
    if row["image"] is None:
        return Image.new("RGB", (row["width"], row["height"]), GREY)
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
