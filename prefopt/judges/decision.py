"""A vision-language model as a judge: its prompts, how its logits are read, and one question at a time.

The words are those of transformers' System One requests, so that its DecisionPipeline, `transformers serve`
and our judges show a model the same tokens. The reading is wider: a yes is any token that spells yes, and the
probability of all other tokens is the answer's `other_mass`. With `bare_labels` the probabilities are those
of DecisionPipeline.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.decision import DecisionConfig
from transformers.decision.template_utils import DECISION_PROMPT, label_token_ids

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.judges.questions import NO, YES, Answer, Case, Question, system_one
from prefopt.loading import files_identity
from prefopt.vlm.inference import adapter_identity, with_adapter
from prefopt.vlm.models import load_vlm

PREDICATE_LABELS = ["Yes", "No"]
SPACES = "\u2581\u0120 "  # how SentencePiece and byte-level vocabularies write a leading space
Prompts = list[tuple[dict[str, Any], list[Any]]]  # of each: the model's inputs, the questions it answers


class VlmAnswerer:
    """A vision-language model with its processor: from a case to prompts, from logits to answers.

    `adapter` is a LoRA for it, in peft's format: a folder or a hub id.
    """

    def __init__(
        self,
        model_name_or_path: str = "pocket",
        revision: str | None = None,
        *,
        adapter: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str = "sdpa",
        bare_labels: bool = False,
    ):
        name = pocket.resolve(str(model_name_or_path), "llava")
        model, processor = load_vlm(
            name, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self.name = name
        self.decision = DecisionConfig.from_pretrained(
            name, revision=revision, _raise_exceptions_for_connection_errors=False
        )
        self.identity = vlm_identity(
            model_name_or_path, revision, adapter=adapter, dtype=dtype, bare_labels=bare_labels
        )
        if self.decision.adapter:
            raise InputError(f"{name} keeps an adapter in {self.decision.adapter}; merge it into the model")
        self.model = (with_adapter(model, adapter) if adapter else model).eval()
        self.processor: Any = copy.copy(processor)
        self.tokenizer: Any = self.processor.tokenizer
        self.processor.image_processor = self._image = _OneImage(self.processor.image_processor)
        self.bare_labels = bare_labels
        self.spellings = {} if bare_labels else _spellings(self.tokenizer)
        self.model.to(device)  # pyright: ignore[reportArgumentType] (its decorator hides the signature)

    def prompts(self, case: Case, *, same_image: bool = False) -> Prompts:
        """The tokenised prompts of a case: one a question, unless the model's own template joins them.

        `same_image` says that the case before showed this image, too.
        """
        if not same_image:
            self._image.forget()
        try:
            prompts = self.decision.prepare_inputs(request(case), self.processor)
        except ValueError as error:
            raise InputError(f"{self.name} cannot be asked: {error}") from error
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(inputs["input_ids"].shape[1] for inputs, _ in prompts)
        if limit is not None and longest > limit:
            raise InputError(
                f"a question about {case.prompt[:60]!r} takes {longest} tokens, {self.name} reads {limit}; "
                "shorten the description or the question, or make the image smaller"
            )
        return prompts

    def read(self, questions: Sequence[Question], asked: Sequence[Any], logits: Tensor) -> list[Answer]:
        """Answers from the next token's logits (questions, vocabulary); `asked` comes from `prompts`."""
        return [
            self._answer(question, parsed, scores)
            for question, parsed, scores in zip(questions, asked, logits, strict=True)
        ]

    def _answer(self, question: Question, parsed: Any, logits: Tensor) -> Answer:
        log_p = logits.double().log_softmax(-1)
        groups = self._tokens(parsed)
        mass = torch.stack([log_p[group].logsumexp(0) for group in groups])
        p = (mass / float(self.decision.temperature.get(parsed.type, 1.0))).softmax(0).tolist()
        if question.type == "predicate":
            by_option = dict(zip(parsed.options, p, strict=True))
            p = [by_option["true"], by_option["false"]]
        other_mass = max(0.0, 1 - float(mass.logsumexp(0).exp()))
        return Answer(dict(zip(question.options, p, strict=True)), other_mass)

    def _tokens(self, parsed: Any) -> list[list[int]]:
        """The tokens that count for each option; the labels of a choice or score are single letters."""
        if not self.bare_labels and parsed.labels == PREDICATE_LABELS:
            return [self.spellings[label.casefold()] for label in parsed.labels]
        try:
            return [[token] for token in label_token_ids(self.tokenizer, tuple(parsed.labels))]
        except ValueError as error:
            raise InputError(f"{self.name} cannot be asked a {parsed.type}: {error}") from error


def vlm_identity(
    model_name_or_path: str,
    revision: str | None = None,
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    bare_labels: bool = False,
) -> str:
    """All that a VLM's answers depend on but for rounding, from its files: nothing is loaded.

    Weights, tokenizer, processor, template and labels are in the files; the rest is how it is asked and read.
    """
    name = pocket.resolve(str(model_name_or_path), "llava")
    asked = [request(Case(Image.new("RGB", (1, 1)), "", ()))["state"], DECISION_PROMPT]
    read = "bare labels" if bare_labels else "all spellings"
    adapted = [adapter_identity(adapter)] if adapter else []
    return content_key(json.dumps([files_identity(name, revision), str(dtype), asked, read, *adapted]))


class DecisionJudge:
    """Any chat model, as transformers' DecisionPipeline asks it: a forward pass per question.

    `model` is a VlmAnswerer, or the name of a model, with `loading` for the rest of VlmAnswerer's arguments.
    """

    def __init__(self, model: str | VlmAnswerer = "pocket", **loading: Any):
        self.answerer = model if isinstance(model, VlmAnswerer) else VlmAnswerer(model, **loading)
        self.identity = self.answerer.identity

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answers of each case, in the order of its questions."""
        return [self._one(case) if case.questions else [] for case in cases]

    @torch.no_grad()
    def _one(self, case: Case) -> list[Answer]:
        model, logits, asked = self.answerer.model, [], []
        for prompt, questions in self.answerer.prompts(case):
            inputs = {name: value.to(model.device) for name, value in prompt.items()}
            marks = inputs.pop("marks")
            logits.append(model(**inputs, use_cache=False, logits_to_keep=marks - 1).logits[0])
            asked += questions
        return self.answerer.read(case.questions, asked, torch.cat(logits))


def request(case: Case) -> dict[str, Any]:
    """The System One request of a case."""
    return system_one(case.questions, case.prompt, case.image)


def _spellings(tokenizer: Any) -> dict[str, list[int]]:
    """Every single token that spells yes, and no: in any case, with or without a space before it."""
    found: dict[str, list[int]] = {YES: [], NO: []}
    for token, number in sorted(tokenizer.get_vocab().items()):
        word = token.lstrip(SPACES).casefold()
        if word in found:
            found[word].append(number)
    for word, tokens in found.items():
        if not tokens:
            raise InputError(f"no single token of this model spells {word!r}, so its answer cannot be read")
    return found


class _OneImage:
    """An image processor that works once: the prompts of a case, or of a few, all show the same image."""

    def __init__(self, wrapped: Any):
        self.wrapped = wrapped
        self.forget()

    def forget(self) -> None:
        """Before another image."""
        self._result: BatchFeature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        result = self.wrapped(*args, **kwargs) if self._result is None else self._result
        self._result = result
        return copy.copy(result)  # processors take entries out of it

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":  # while it is being copied there is none yet
            raise AttributeError(name)
        return getattr(self.wrapped, name)
