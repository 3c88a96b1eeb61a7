"""What systems answer to questions, and how likely they find the right answers: kept by content."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, ProcessorMixin

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.evaluation.asked import Asked, Questions
from prefopt.evaluation.scoring import quiet
from prefopt.evaluation.systems import VlmSystem
from prefopt.files import content_key
from prefopt.ledger import Ledger
from prefopt.loading import files_identity, load_part, own_memory
from prefopt.progress import progress_bar
from prefopt.vlm.batches import Collator
from prefopt.vlm.examples import VisionExample, read_vision_examples
from prefopt.vlm.generate import Request, generate
from prefopt.vlm.inference import adapter_identity
from prefopt.vlm.messages import PLACEHOLDER
from prefopt.vlm.models import VLM, four_bits, load_vlm, start_from_lora
from prefopt.vlm.rows import unshareable
from prefopt.vlm.scoring import CompletionScore, check_head
from prefopt.vlm.trees import PromptPositions


class Answered(NamedTuple):
    """A system's answer to a question, and its likelihood of the right one."""

    text: str
    tokens: int  # generated
    finished: bool  # it ended by itself, not at the longest length
    log_p: float  # of the reference answer, in nats
    reference_tokens: int


class Answering:
    """Answers questions greedily, and scores their references; nothing that the ledger holds is computed."""

    def __init__(
        self,
        questions: Questions,
        ledger: Ledger,
        *,
        max_new_tokens: int,
        batch_size: int,
        device: torch.device,
    ):
        self.questions, self.ledger, self.device = questions, ledger, device
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._depends: dict[VlmSystem, list[Any]] = {}  # all that its words depend on but the question

    def run(self, systems: Mapping[str, VlmSystem], asked: Sequence[Asked]) -> dict[str, list[Answered]]:
        """What each system says to each question; a base is loaded once for all of its adapters.

        InputError for models of different vocabularies, whose losses per token have different units.
        """
        bases = list(dict.fromkeys(system.base for system in systems.values()))
        self._depends = {s: [weights_of(s), s.dtype, s.load_in_4bit] for s in systems.values()}
        _check_vocabularies(bases)
        for base in bases:
            missing = {
                system: todo
                for system in dict.fromkeys(systems.values())
                if system.base == base and any(todo := self._missing(system, asked))
            }
            if missing:
                self._work(base, missing)
        return {name: [self._kept(system, one) for one in asked] for name, system in systems.items()}

    def _work(self, base: VlmSystem, missing: Mapping[VlmSystem, tuple[list[Asked], list[Asked]]]) -> None:
        """Load a base; for each of its systems, answer the first questions and score the second ones."""
        model, processor = load_system(base, self.device)
        for system, (unanswered, unscored) in missing.items():
            with adapted(model, system.adapter) as policy:
                name = system.adapter or system.model
                for batch in self._batches(unanswered, f"answers of {name}"):
                    self._generate(system, policy, processor, batch)
                score = ReferenceScore(policy, processor)
                for batch in self._batches(unscored, f"losses of {name}"):
                    self._score(system, score, batch)

    def _generate(self, system: VlmSystem, model: nn.Module, processor: Any, batch: Sequence[Asked]) -> None:
        requests = [Request(self.questions.images(one), one.prompt, one.where) for one in batch]
        answers = generate(
            model,
            processor,
            requests,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            batch_size=len(batch),
        )
        self.ledger.add(
            {
                self._answer_key(system, one): {
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "finished": answer.finished,
                }
                for one, (answer,) in zip(batch, answers, strict=True)
            }
        )

    def _score(self, system: VlmSystem, score: "ReferenceScore", batch: Sequence[Asked]) -> None:
        scored = score([self.questions.example(one) for one in batch], self.device)
        self.ledger.add(
            {
                self._loss_key(system, one): {"log_p": log_p, "reference_tokens": tokens}
                for one, (log_p, tokens) in zip(batch, scored, strict=True)
            }
        )

    def _kept(self, system: VlmSystem, one: Asked) -> Answered:
        answer, loss = self.ledger[self._answer_key(system, one)], self.ledger[self._loss_key(system, one)]
        return Answered(**answer, **loss)

    def _missing(self, system: VlmSystem, asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
        """The questions without an answer, and those whose reference is not scored; equal ones once."""
        answers = {self._answer_key(system, one): one for one in asked}
        losses = {self._loss_key(system, one): one for one in asked}
        unanswered, unscored = (
            [one for key, one in keys.items() if key not in self.ledger] for keys in (answers, losses)
        )
        return unanswered, unscored

    def _answer_key(self, system: VlmSystem, one: Asked) -> str:
        return content_key(json.dumps([self._depends[system], one.key, self.max_new_tokens]))

    def _loss_key(self, system: VlmSystem, one: Asked) -> str:
        return content_key(json.dumps([self._depends[system], one.key, one.answer]))

    def _batches(self, asked: Sequence[Asked], what: str) -> Iterator[Sequence[Asked]]:
        starts = range(0, len(asked), self.batch_size)
        for start in progress_bar(starts, desc=what, unit="batch", disable=not asked or quiet()):
            yield asked[start : start + self.batch_size]


class ReferenceScore:
    """log p of right answers under a model, each prompt read once for all of its answers where it can."""

    def __init__(self, model: Any, processor: ProcessorMixin):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        positions = PromptPositions(base) if unshareable(base.config) is None else None
        self.model, self.score = model, CompletionScore(frozen_vision=True)
        self.collate = Collator(processor, positions=positions)

    @torch.no_grad()
    def __call__(self, examples: Sequence[VisionExample], device: torch.device) -> list[tuple[float, int]]:
        """Of each example the sum of log p over the answer's tokens, and their number."""
        batch = send_to_device(self.collate(examples), device)
        scores = self.score(self.model, self.score.prepare(self.model, batch)).scores
        return list(zip(scores[:, 0].tolist(), batch["tokens"][:, 0].tolist(), strict=True))


# Models


def weights_of(system: VlmSystem) -> dict[str, str | None]:
    """What the model's files hold, and the adapter's."""
    model = files_identity(_name(system), system.revision)
    return {"model": model, "adapter": adapter_identity(system.adapter) if system.adapter else None}


def load_system(base: VlmSystem, device: torch.device) -> tuple[Any, ProcessorMixin]:
    """A system's model without its adapter, in evaluation mode on the device, and its processor."""
    dtype = getattr(torch, base.dtype)
    model, processor = load_vlm(
        _name(base),
        revision=base.revision,
        dtype=dtype,
        quantization=four_bits(dtype) if base.load_in_4bit else None,
    )
    check_head(model.config)
    loaded: Any = model.eval()
    # 4-bit weights were quantised where they are used.
    return (loaded if base.load_in_4bit else own_memory(loaded).to(device)), processor


@contextmanager
def adapted(model: Any, adapter: str | None) -> Iterator[nn.Module]:
    """The model with an adapter on it, which is taken off on leaving."""
    if adapter is None:
        yield model
        return
    policy: Any = start_from_lora(model, adapter)
    try:
        yield policy.eval()
    finally:
        policy.unload()


def _name(system: VlmSystem) -> str:
    return pocket.resolve(system.model, "llava")


def read_questions(
    source: str,
    system: VlmSystem,
    *,
    split: str = "test",
    config: str | None = None,
    revision: str | None = None,
    most: int | None = None,
) -> Questions:
    """The questions of a table's split; `most` rows of it, with images spelled as the system reads them."""
    token = getattr(_processor(system), "image_token", PLACEHOLDER)
    examples = read_vision_examples(
        source, "sft", split=split, config=config, revision=revision, image_token=token
    )
    return Questions(examples if most is None else examples.select(range(min(most, len(examples)))))


def _processor(system: VlmSystem) -> Any:
    return load_part(AutoProcessor, _name(system), VLM, system.revision, trust_remote_code=False)


def _check_vocabularies(bases: Sequence[VlmSystem]) -> None:
    first, *others = bases
    if not others:
        return
    vocabularies = {base: _processor(base).tokenizer.get_vocab() for base in bases}
    for other in others:
        if vocabularies[other] != vocabularies[first]:
            raise InputError(
                f"{other.model} has another vocabulary than {first.model}, so their losses per token have "
                "different units; compare them with their own adapters, each in a run of its own"
            )
