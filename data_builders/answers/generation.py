"""From prompts to answers: a vision-language model with its adapter, and its pass over the blocks."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from tqdm import tqdm

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.source import Source
from data_builders.engine.passes import ModelPass
from data_builders.engine.stages import Record, batched
from prefopt import pocket
from prefopt.files import content_key
from prefopt.ledger import Ledger
from prefopt.loading import Lazy, files_identity, own_memory
from prefopt.vlm.generate import Generated, Request, generate
from prefopt.vlm.inference import adapter_identity, with_adapter
from prefopt.vlm.models import load_vlm


class Generator(Protocol):
    """Anything that answers prompts; all that its answers depend on is in the identity of its Lazy."""

    def generate(self, requests: Sequence[Request]) -> list[list[Generated]]:
        """The answers to each request, in the order of their numbers."""
        ...


class VlmGenerator:
    """The vision-language model of the options: it reads a prompt and its images once for all answers."""

    def __init__(self, config: SelfCritiqueConfig, device: torch.device):
        model, self.processor = load_vlm(
            pocket.resolve(config.model_name_or_path, "llava"),
            revision=config.model_revision,
            dtype=getattr(torch, config.dtype),
        )
        model = with_adapter(model, config.adapter) if config.adapter else model
        self.model: Any = own_memory(model.eval()).to(device)
        self.config = config

    def generate(self, requests: Sequence[Request]) -> list[list[Generated]]:
        """The answers to each request, each a function of the prompt, its images, the seed and its number."""
        config = self.config
        return generate(
            self.model,
            self.processor,
            requests,
            max_new_tokens=config.max_new_tokens,
            answers=config.answers,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
        )


def generator_of(config: SelfCritiqueConfig, device: torch.device) -> Lazy[Generator]:
    """The generator that the options name; its identity holds files and sampling, and nothing is loaded."""
    sampling = {name: getattr(config, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    depends = {**model_identities(config), "dtype": config.dtype, **sampling}
    identity = f"answers {content_key(json.dumps(depends, sort_keys=True))}"
    return Lazy(identity, partial(VlmGenerator, config, device))


def model_identities(config: SelfCritiqueConfig) -> dict[str, str]:
    """The hashes of the answering model's files and of its adapter's, which are columns, too."""
    name = pocket.resolve(config.model_name_or_path, "llava")
    return {
        "model_identity": files_identity(name, config.model_revision),
        "adapter_identity": adapter_identity(config.adapter) if config.adapter else "",
    }


class AnswerPrompts(ModelPass[Generator]):
    """Answers every prompt; kept by content, so only what has no answer is answered."""

    name, unit = "answering", "prompt"

    def __init__(
        self, generator: Lazy[Generator], source: Source, ledger: Ledger, *, answers: int, batch_size: int
    ):
        super().__init__(generator)
        self.source, self.ledger = source, ledger
        self.numbers, self.batch_size = range(answers), batch_size

    def todo(self, block: int) -> int:
        """The prompts of a block that lack an answer."""
        return sum(map(len, self._missing(block)))

    def work(self, block: int, bar: tqdm) -> None:
        """Answer what has no answer, batch by batch."""
        for batch in self._missing(block):
            requests = [
                Request(self.source.images(record), record["prompt"], record["prompt_id"]) for record in batch
            ]
            found = self.model.generate(requests)
            self.calls += len(batch)
            self.ledger.add(
                {
                    key: {"text": answer.text, "tokens": answer.tokens, "finished": answer.finished}
                    for record, answers in zip(batch, found, strict=True)
                    for number, answer in zip(self.numbers, answers, strict=True)
                    if (key := self._key(record, number)) not in self.ledger
                }
            )
            bar.update(len(batch))

    def answers(self, record: Record) -> list[Generated]:
        """The kept answers to a prompt, in the order of their numbers."""
        return [Generated(**self.ledger[self._key(record, number)]) for number in self.numbers]

    def is_answered(self, record: Record) -> bool:
        """Whether a prompt has all of its answers."""
        return all(self._key(record, number) in self.ledger for number in self.numbers)

    def _key(self, record: Record, number: int) -> str:
        return content_key(json.dumps([self.identity, record["prompt_id"], number]))

    def _missing(self, block: int) -> list[list[Record]]:
        """Batches of prompts that lack an answer; finished batches are left out."""
        batches = [
            [record for record in batch if not self.is_answered(record)]
            for batch in batched(self.source.blocks[block], self.batch_size)
        ]
        return list(filter(None, batches))
