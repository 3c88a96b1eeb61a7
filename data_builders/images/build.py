"""A build of image candidates: its passes over blocks, then tables, card and gallery from their results."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from data_builders.engine.blocks import ImageBlocks, Images
from data_builders.engine.passes import Pass, run_passes
from data_builders.engine.reasons import SCORE_NOT_FINITE
from data_builders.engine.stages import (
    NOT_SELECTED,
    Group,
    Record,
    Stage,
    by_prompt,
    flow,
    is_valid,
    mark_invalid,
)
from data_builders.export.gallery import Gallery
from data_builders.export.hub import push
from data_builders.export.summary import TABLE, Summary, write_build
from data_builders.export.tables import EVERYTHING, EXPORTS
from data_builders.export.writers import write_exports
from data_builders.images.config import BuilderConfig
from data_builders.images.detection import DetectObjects
from data_builders.images.detector_checks import check
from data_builders.images.generation import GenerateImages
from data_builders.images.judging import JudgeImages, open_row
from data_builders.images.selection import combine, pairs, rank, ranked
from data_builders.prompts.reading import Prompts
from prefopt.detectors import Box, Detector
from prefopt.errors import InputError
from prefopt.judges.questions import Answer, Judge
from prefopt.judges.reward import RUBRIC as REWARD
from prefopt.judges.rubric import Rubric
from prefopt.ledger import Ledger
from prefopt.loading import Lazy

# What decides on tables besides the images.
DECIDING = (
    "rubric",
    "question_weights",
    "judge_model_name_or_path",
    "judge_url",
    "discriminator_name_or_path",
)


def replaced(folder: Path, settings: Mapping[str, Any]) -> str:
    """A sentence if the folder's tables are of another rubric, judge or discriminator, else nothing."""
    try:
        before = dict(json.loads((folder / "BUILD.json").read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""  # none, or a damaged one, which is written anew
    changed = [name for name in DECIDING if before.get(name) != json.loads(json.dumps(settings[name]))]
    told = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in changed)
    return f"{folder}: this replaces tables that were made with {told}" if changed else ""


class Opinions(NamedTuple):
    """The passes over finished images."""

    judge: JudgeImages
    discriminator: JudgeImages | None
    detect: DetectObjects | None


@dataclass
class Build:
    """What a build is made of; what looks at images is anything with an identity that can be loaded."""

    config: BuilderConfig
    prompts: Prompts
    rubric: Rubric
    judge: Lazy[Judge]
    select: Stage  # marks the selected candidates of each prompt
    selection: str  # which those are, in words
    discriminator: Lazy[Judge] | None = None  # that ranks beside the judge
    detector: Lazy[Detector] | None = None
    detection_threshold: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)  # what these models are called

    def run(self, state: PartialState) -> str:
        """Compute what is missing, each process its share; then write everything. A sentence about it.

        A build that selects nothing is an InputError; nothing that was computed is lost.
        """
        start, config, folder = perf_counter(), self.config, Path(self.config.output_dir)
        if self.rubric.checks and self.detector is None:
            raise InputError(
                f"--rubric {config.rubric}: the question {self.rubric.checks[0].name!r} needs a detector; "
                "name a --detector, an option of self_rewarding.py"
            )
        if state.is_main_process and (said := replaced(folder, asdict(config))):
            print(said, flush=True)
        work, process = folder / "work", state.process_index
        generate = self._generate(work, torch.device(str(state.device)))
        images = Images([each.blocks for each in generate])
        judge = JudgeImages(
            self.judge,
            self.rubric,
            images,
            Ledger(work, "answers", process),
            batch_size=config.judge_batch_size,
            calibrate=config.calibrate,
        )
        discriminator = None
        if self.discriminator is not None:
            discriminator = JudgeImages(
                self.discriminator,
                Rubric.load(REWARD),
                images,
                judge.ledger,
                batch_size=config.judge_batch_size,
                calibrate=False,
                name="judging with the discriminator",
            )
        detect = None
        if self.detector is not None:
            ledger = Ledger(work, "boxes", process)
            detect = DetectObjects(self.detector, images, ledger, batch_size=config.batch_size)
        opinions = Opinions(judge, discriminator, detect)
        passes: list[Pass] = [*generate, *filter(None, opinions)]
        calls = run_passes(passes, len(images), state, keep_resident=config.keep_resident)
        said = ""
        if state.is_main_process:
            made = sum((Counter(of_one) for of_one in calls), Counter[str]())
            facts = {
                "processes": state.num_processes,
                "seconds": round(perf_counter() - start, 1),
                "calls": {each.name: made[each.name] for each in passes},
            }
            identities = {each.name: each.identity for each in passes}
            said = self._write(folder, images, opinions, facts, identities)
        state.wait_for_everyone()
        return said

    def _generate(self, work: Path, device: torch.device) -> list[GenerateImages]:
        """The pass of each generator, which takes its turns among a prompt's candidates."""
        config, generators = self.config, self.config.generators
        passes = []
        for place, generator in enumerate(generators):
            numbers = range(config.candidates)[place :: len(generators)]
            model = generator.identity
            identity = model | {
                "candidates": list(numbers),
                "seed": config.seed,
                "batch_size": config.batch_size,
                "block_size": config.block_size,
            }
            folder = work / f"images-{place}"
            blocks = ImageBlocks(folder, identity, self.prompts.training, config.block_size)
            # Two generators may be one model with other settings.
            name = f"generating with {generator.model}" + (f", {place + 1}" if len(generators) > 1 else "")
            settings = {"seed": config.seed, "batch_size": config.batch_size, "device": device}
            passes.append(GenerateImages(name, generator, numbers, blocks, **settings))
        return passes

    def _write(
        self,
        folder: Path,
        images: Images,
        opinions: Opinions,
        run: Mapping,
        identities: Mapping[str, str],
    ) -> str:
        """From what is kept to the tables, the card and the gallery; on one process."""
        config, summary = self.config, Summary(self.rubric, self.prompts.left_out)
        for table in images.tables:
            table.clean()
        for each in filter(None, opinions):
            each.ledger.refresh()
        gallery = Gallery(self.rubric) if config.gallery else None
        # Pairs that no table holds are none.
        paired = not {"pairs", "pickapic"}.isdisjoint(config.exports)

        def counted() -> Iterator[Group]:
            for group in self._groups(images, opinions):
                summary.add(group)
                if gallery:
                    gallery.add(group if paired else group._replace(pairs=[]))
                yield group

        counts = write_exports(
            counted(),
            folder,
            {TABLE: EVERYTHING, **{name: EXPORTS[name] for name in config.exports}},
            test_fraction=config.test_fraction,
            max_bytes=config.shard_megabytes * 2**20,
        )
        said = write_build(
            folder, asdict(config), identities, summary, counts, selection=self.selection, run=run
        )
        if gallery:
            gallery.write(folder, selection=self.selection, facts=summary.facts(counts))
        if config.push_to_hub:
            push(folder, config.push_to_hub)
        return said

    def _groups(self, images: Images, opinions: Opinions) -> Iterator[Group]:
        """The candidates of each prompt, judged, ranked and selected, and their pairs."""
        rows = (self._judged(row, opinions) for block in range(len(images)) for row in images.rows(block))
        ranking = [combine, rank] if opinions.discriminator else [rank]
        for candidates in by_prompt(flow(rows, [*ranking, self.select])):
            yield Group(candidates, ranked(candidates), pairs(candidates, self.config.pair_options))

    def _judged(self, row: Record, opinions: Opinions) -> Record:
        """A row of a block with the judge's answers, the discriminator's score and the detector's boxes."""
        judge, discriminator, detect = opinions
        row = row | {
            "questions": [item.name for item in self.rubric.items],
            "judge": self.names.get("judge", ""),
            "judge_identity": judge.identity,
            "detector": self.names.get("detector", ""),
            "detector_identity": detect.identity if detect else "",
            "judge_score": None,
            "discriminator_score": None,
            "discriminator": self.names.get("discriminator", ""),
            "discriminator_identity": discriminator.identity if discriminator else "",
            "boxes": [],
            "confidence": 0.0,
            NOT_SELECTED: "",
        }
        if not is_valid(row):
            return row
        if discriminator:
            row["discriminator_score"] = discriminator.soft_score(row)
            if not isfinite(row["discriminator_score"]):
                return mark_invalid(row | {"discriminator_score": None}, SCORE_NOT_FINITE)
        boxes = detect.boxes(row) if detect else []
        return judge.scored(row, self._checks(row, boxes), boxes)

    def _checks(self, row: Record, boxes: list[Box]) -> dict[str, Answer]:
        """The detector's answers to the rubric's checks."""
        if not self.rubric.checks:
            return {}
        image, threshold = open_row(row), self.detection_threshold
        return {
            item.name: check(item.check, image, row["prompt"], row["class"], boxes, threshold)
            for item in self.rubric.checks
            if item.check
        }
