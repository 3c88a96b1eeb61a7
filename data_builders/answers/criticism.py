"""Which of two answers is better: the critic, and its pass over the blocks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations

import torch
from tqdm import tqdm

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.generation import AnswerPrompts
from data_builders.answers.selection import contenders
from data_builders.answers.source import Source
from data_builders.engine.passes import ModelPass
from data_builders.engine.stages import Record, batched
from prefopt import pocket
from prefopt.files import content_key
from prefopt.judges.critic import TEXT, TYPED, TextCritic, TypedCritic
from prefopt.judges.critic_cases import PairCase, Preference, Templates
from prefopt.judges.loading import lazy_critic
from prefopt.ledger import Ledger
from prefopt.loading import Lazy

AnyCritic = TextCritic | TypedCritic


def critic_of(config: SelfCritiqueConfig, device: torch.device) -> Lazy[AnyCritic]:
    """The critic that the options name; InputError now, not after hours of answers, if words are missing."""
    name, revision, adapter = config.critic
    if not config.critic_name_or_path:
        name = pocket.resolve(name, "llava")  # the model that answers, not the pocket's critic
    templates = _templates(config)
    templates.words(PairCase([], "", "", "", "" if config.with_reference else None))
    return lazy_critic(
        name,
        revision,
        url=config.critic_url,
        templates=templates.folder,
        typed=not config.critic_writes,
        adapter=adapter,
        dtype=getattr(torch, config.dtype),
        device=device,
        batch_size=config.critic_batch_size,
    )


def critic_question(config: SelfCritiqueConfig) -> str:
    """The words in which the critic compares two answers, with the places of question and answers."""
    return _templates(config).texts["compare_with_reference" if config.with_reference else "compare"]


def _templates(config: SelfCritiqueConfig) -> Templates:
    return Templates.load(config.critic_templates or (TEXT if config.critic_writes else TYPED))


class CompareAnswers(ModelPass[AnyCritic]):
    """Compares every two different answers to a prompt, in both orders; `calls` counts the questions.

    The cases of a prompt go to the critic together and show one image, which a judge with shared rows reads
    once for all of them.
    """

    name, unit = "comparing", "prompt"

    def __init__(
        self,
        critic: Lazy[AnyCritic],
        source: Source,
        answering: AnswerPrompts,
        ledger: Ledger,
        *,
        batch_size: int,
        with_reference: bool,
    ):
        super().__init__(replace(critic, load=lambda: self._loaded(critic)))
        self.source, self.answering, self.ledger = source, answering, ledger
        self.batch_size, self.with_reference = batch_size, with_reference

    def todo(self, block: int) -> int:
        """The prompts of a block with two answers that were not compared."""
        return sum(map(len, self._missing(block)))

    def work(self, block: int, bar: tqdm) -> None:
        """Compare what was not compared, batch by batch."""
        for batch in self._missing(block):
            asked: dict[str, PairCase] = {}
            for record, pairs in batch:
                images = self.source.images(record)
                for first, second in pairs:
                    case = self._case(record, first, second)
                    asked[self._key(record, first, second)] = replace(case, images=images)
            found = self.model.compare(list(asked.values()))
            self.calls += 2 * len(asked)
            self.ledger.add({key: each and asdict(each) for key, each in zip(asked, found, strict=True)})
            bar.update(len(batch))

    def preference(self, record: Record, first: str, second: str) -> Preference | None:
        """The kept preference between two answers; None if the critic's own could not be read."""
        one, other = sorted((first, second))
        entry = self.ledger[self._key(record, one, other)]
        if entry is None:
            return None
        kept = Preference(**entry)
        return kept if one == first else replace(kept, p_first=1 - kept.p_first)

    def _pairs(self, record: Record) -> Iterator[tuple[str, str]]:
        """Every two different answers, in an order that does not depend on which was generated first."""
        return combinations(sorted(contenders(self.answering.answers(record))), 2)

    def _case(self, record: Record, first: str, second: str) -> PairCase:
        reference = record["reference"] if self.with_reference else None
        return PairCase([], record["question"], first, second, reference)

    def _key(self, record: Record, first: str, second: str) -> str:
        """A hash of all that a preference depends on."""
        case = self._case(record, first, second)
        told = [case.question, case.first, case.second, case.reference]
        return content_key(json.dumps([self.identity, record["prompt_id"], *told]))

    def _missing(self, block: int) -> list[list[tuple[Record, Sequence[tuple[str, str]]]]]:
        """Batches of prompts with their pairs that were not compared; finished batches are left out."""
        records = self.source.blocks[block]
        batches = []
        for batch in batched((r for r in records if any(self._pairs(r))), self.batch_size):
            asked = [
                (
                    record,
                    [pair for pair in self._pairs(record) if self._key(record, *pair) not in self.ledger],
                )
                for record in batch
            ]
            if asked := [(record, pairs) for record, pairs in asked if pairs]:
                batches.append(asked)
        return batches

    def _loaded(self, critic: Lazy[AnyCritic]) -> AnyCritic:
        """The critic, which takes what earlier runs asked as asked by itself.

        Else a resumed run that has nothing left but what cannot be read would take it for one that never can.
        """
        loaded = critic.load()
        keys = {
            self._key(record, *pair)
            for block in self.source.blocks
            for record in block
            if self.answering.is_answered(record)
            for pair in self._pairs(record)
        }
        kept = [self.ledger[key] for key in keys if key in self.ledger]
        loaded.readings.asked += 2 * len(kept)
        loaded.readings.unreadable += sum(entry is None for entry in kept)
        return loaded
