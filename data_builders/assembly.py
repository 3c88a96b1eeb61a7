"""A self-rewarding build: the phases over its blocks, and from what they kept to tables, card and gallery."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from data_builders.blocks import DRAWN, CandidatesTable
from data_builders.checks import check
from data_builders.gallery import write_gallery
from data_builders.phases import Ask, Detect, Draw, Drawn, Phase, empty_image, opened
from data_builders.selection import (
    pair_row,
    pairs,
    pickapic_row,
    rank_by_score,
    ranked_row,
    select_optimal,
)
from data_builders.self_rewarding_config import NONE, SelfRewardingConfig
from data_builders.shards import JUDGED, PAIRS, PICKAPIC, RANKED, SFT, Export, write_exports
from data_builders.sources import Source, parse_source, settle
from data_builders.stages import Record, Stage, by_prompt, flow, kept
from data_builders.summary import Summary, write_build
from prefopt.detectors.loading import load_detector
from prefopt.judges.endpoint import EndpointJudge
from prefopt.judges.packed import load_judge
from prefopt.judges.questions import Answer, Judge
from prefopt.judges.reward import RewardJudge, check_questions, reward_type
from prefopt.judges.rubric import Rubric
from prefopt.records import InputError
from prefopt.store import Ledger, content_key, writing


class Build:
    """What a build is made of: prompts, tables of drawn images, ledgers of answers and boxes, phases."""

    def __init__(self, config: SelfRewardingConfig, folder: Path, prompts: list[Record], state: PartialState):
        self.config, self.folder, self.prompts = config, folder, prompts
        device = torch.device(str(state.device))
        self.rubric = Rubric.load(config.rubric)
        self.classes = {prompt["prompt_id"]: prompt["class"] for prompt in prompts}
        self.work = folder / "work"
        if not config.judge_url and reward_type(config.judge_model_name_or_path, config.judge_revision):
            # Hours of drawing come before the first answer.
            check_questions(config.judge_model_name_or_path, self.rubric.questions("", ""))
        if self.rubric.checks and config.detector == NONE:
            raise InputError(
                f"--rubric {config.rubric}: {self.rubric.checks[0].name} is a detector's; name a --detector"
            )
        sources = [parse_source(text, config.source) for text in config.sources] or [config.source]
        draws = [self._draw(source, place, len(sources), device) for place, source in enumerate(sources)]
        self.drawn = Drawn([draw.table for draw in draws])
        process = state.process_index
        self.ask = Ask(
            partial(judge_of, config, device),
            self.rubric,
            self.classes,
            self.drawn,
            Ledger(self.work, "answers", process),
            batch_size=config.judge_batch_size,
            calibrate=config.calibrate,
        )
        self.detect = None
        if config.detector != NONE:
            self.detect = Detect(
                partial(load_detector, config.detector, revision=config.detector_revision, device=device),
                self.classes,
                self.drawn,
                Ledger(self.work, "boxes", process),
                batch_size=config.batch_size,
            )
        self.phases: list[Phase] = [*draws, self.ask, *([self.detect] if self.detect else [])]

    @property
    def blocks(self) -> int:
        """How many blocks of prompts there are."""
        return self.drawn.blocks

    def _draw(self, source: Source, place: int, sources: int, device: torch.device) -> Draw:
        config = self.config
        numbers = range(config.candidates)[place::sources]
        identity = source.identity() | {
            "candidates": list(numbers),
            "seed": config.seed,
            "batch_size": config.batch_size,
            "block_size": config.block_size,
        }
        prompts = [prompt | source.identity() | source.names() for prompt in self.prompts]
        folder = self.work / f"drawn-{content_key(json.dumps(identity))[:16]}"
        table = CandidatesTable(folder, identity, prompts, config.block_size, DRAWN)
        # Two sources may be one model with other settings.
        name = f"drawing by {source.model}" + (f", source {place + 1}" if sources > 1 else "")
        return Draw(name, source, numbers, table, config.seed, config.batch_size, device)

    # From what is kept to the dataset, on one process

    def finish(self, calls: Sequence[Mapping[str, int]], *, seconds: float) -> str:
        """Select, export, and say what came of it; a build that yields nothing is an InputError."""
        for table in self.drawn.tables:
            table.clean()
        self.ask.ledger.refresh()
        if self.detect:
            self.detect.ledger.refresh()
        config, summary = self.config, Summary(self.rubric)
        exports = [Export("candidates", JUDGED, list), *self._exports()]

        def groups() -> Iterator[list[Record]]:
            for group in self.groups():
                summary.add(group)
                yield group

        counts = write_exports(
            groups(),
            self.folder,
            exports,
            test_fraction=config.test_fraction,
            max_bytes=config.shard_megabytes * 2**20,
        )
        made = Counter[str]()
        for of_one_process in calls:
            made.update(of_one_process)
        run = {"processes": len(calls), "seconds": round(seconds, 1), "calls": dict(made)}
        identities = {phase.name: phase.identity for phase in self.phases}
        said = write_build(self.folder, asdict(config), identities, summary, counts, run)
        if config.gallery:
            title = f"Candidates: {', '.join(config.classes)}"
            write_gallery(self.folder, self.groups(), title=title, facts=summary.facts(counts))
        if config.push_to_hub:
            push(self.folder, config.push_to_hub)
        return said

    def groups(self) -> Iterator[list[Record]]:
        """The candidates of each prompt, judged, ranked and selected."""
        threshold = self.config.detection_threshold if self.detect else None
        select = select_optimal(threshold, soft_decides=self.rubric.soft_decides)
        stages: list[Stage] = [rank_by_score, select]
        rows = (self._judged(row) for block in range(self.blocks) for row in self.drawn.rows(block))
        return by_prompt(flow(rows, stages))

    def _judged(self, row: Record) -> Record:
        """A drawn row with what judge and detector have said of it."""
        row = row | {
            "class": self.classes[row["prompt_id"]],
            "questions": [item.name for item in self.rubric.items],
            "judge": self.config.judge_url or self.config.judge_model_name_or_path,
            "judge_identity": self.ask.identity,
            "detector": self.config.detector,
            "detector_identity": self.detect.identity if self.detect else "",
            "boxes": [],
            "confidence": 0.0,
        }
        if not kept(row):
            return row
        boxes = self.detect.boxes(row) if self.detect else []
        answers = self.ask.answers(row) | self._checks(row, boxes)
        empty = self.ask.answers(empty_image(row)) if self.config.calibrate else {}
        verdicts = {name: answer.verdict for name, answer in answers.items()}
        points, soft = self.rubric.points(verdicts), self.rubric.soft_points(answers, empty)
        names = row["questions"]
        return row | {
            "verdicts": [verdicts[name] or "" for name in names],
            "log_odds": [answers[name].log_odds for name in names],
            "empty_log_odds": [empty[name].log_odds if name in empty else 0.0 for name in names],
            "leaked": [answers[name].leaked for name in names],
            "points": [points[name] for name in names],
            "hard_score": sum(points.values()),
            "soft_score": sum(soft.values()),
            "boxes": [box._asdict() for box in boxes],
            "confidence": max((box.confidence for box in boxes), default=0.0),
        }

    def _checks(self, row: Record, boxes: list) -> dict[str, Answer]:
        if not self.rubric.checks:
            return {}
        image, threshold = opened(row), self.config.detection_threshold
        return {
            item.name: check(item.check, image, row["prompt"], row["class"], boxes, threshold)
            for item in self.rubric.checks
            if item.check
        }

    def _exports(self) -> list[Export]:
        config = self.config
        made = partial(
            pairs, rule=config.pair_rule, min_margin=config.min_margin, cap=config.max_pairs_per_prompt
        )
        every = {
            "sft": Export("sft", SFT, optimal),
            "imagefolder": Export("imagefolder", None, optimal),
            "pairs": Export("pairs", PAIRS, lambda group: [pair_row(*pair) for pair in made(group)]),
            "pickapic": Export(
                "pickapic", PICKAPIC, lambda group: [pickapic_row(*pair) for pair in made(group)]
            ),
            "ranked": Export("ranked", RANKED, ranked_row),
        }
        return [every[name] for name in config.exports]


def judge_of(config: SelfRewardingConfig, device: torch.device) -> Judge:
    """The judge that the options name: behind a URL, or loaded here."""
    if config.judge_url:
        return EndpointJudge(config.judge_url, config.judge_model_name_or_path)
    judge = load_judge(
        config.judge_model_name_or_path,
        config.judge_revision,
        dtype=getattr(torch, config.judge_dtype),
        device=device,
        batch_size=config.judge_batch_size,
    )
    settle(judge.scorer.model if isinstance(judge, RewardJudge) else judge.respondent.model)
    return judge


def optimal(group: list[Record]) -> list[Record]:
    """The selected candidate of a prompt, if there is one."""
    return [row for row in group if row["selected"]]


def push(folder: Path, repository: str) -> None:
    """Upload a finished build; its tables are bounded files already, so memory stays bounded, too."""
    from huggingface_hub import HfApi  # the one place where a build talks to the hub

    with writing(f"the hub's {repository}"):
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="dataset", ignore_patterns=["work/**", ".lock"]
        )
