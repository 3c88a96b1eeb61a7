"""From messages to token ids: the prompt with its images, and completions of which the answers are scored.

A chat template that leaves a turn open, as LLaVA-1.5's does, would never teach the model to stop: BOS is
added where the tokenizer would add it and the template does not, and EOS where the template has not closed
an answer. Both are part of what the model reads, and EOS is part of the score.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor
from transformers import ProcessorMixin

from prefopt.errors import InputError
from prefopt.files import files_key
from prefopt.vlm.examples import VisionExample


class Part(NamedTuple):
    """A stretch of a completion's text: an answer, or what stands between two answers."""

    text: str
    scored: bool


class Texts(NamedTuple):
    """An example as the chat template writes it; the prompt ends where the first answers begin."""

    prompt: str
    completions: list[list[Part]]


class Completion(NamedTuple):
    """A completion's tokens, and which of them are the model's to say."""

    ids: list[int]
    scored: list[bool]


class Prompt(NamedTuple):
    """A prompt's tokens, all of its images' placeholders among them, and its images' tensors."""

    ids: list[int]
    kinds: dict[str, list[int]]  # what else the processor says of each token
    images: dict[str, Tensor]  # the model's other inputs, a batch of one; empty without images


class Encoded(NamedTuple):
    """An example in tokens."""

    prompt: Prompt
    completions: list[Completion]


class Encoder:
    """Encodes examples for a processor's model; InputError for a tokenizer that cannot end a completion.

    A completion that does not fit into `max_length` beside its prompt loses its end; a prompt that leaves no
    room for one is an InputError, since its images cannot be cut.
    """

    def __init__(self, processor: ProcessorMixin, *, max_length: int | None = None):
        self.processor: Any = processor
        self.tokenizer: Any = self.processor.tokenizer
        self.max_length = max_length
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos_token, so no completion could be ended; set one")

    @property
    def identity(self) -> Mapping[str, str]:
        """What the tokens depend on besides the examples."""
        with TemporaryDirectory() as folder:
            self.processor.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {"processor": files_key(Path(folder), files), "max_length": str(self.max_length)}

    def __call__(self, example: VisionExample) -> Encoded:
        texts = render(self.processor, example)
        prompt = encode_prompt(self.processor, texts.prompt, example["images"])
        whole = [encode_completion(self.tokenizer, texts.prompt, parts) for parts in texts.completions]
        completions = [self._fit(prompt, completion, example["where"]) for completion in whole]
        if any(completions[0].ids == other.ids for other in completions[1:]):
            raise InputError(
                f"{example['where']}: chosen and rejected are the same {len(completions[0].ids)} tokens "
                f"within max_length {self.max_length}; raise --max_length or drop the row"
            )
        return Encoded(prompt, completions)

    def _fit(self, prompt: Prompt, completion: Completion, where: str) -> Completion:
        """The completion, cut at its end to what `max_length` leaves beside the prompt."""
        if self.max_length is None:
            return completion
        room = max(0, self.max_length - len(prompt.ids))
        if not any(completion.scored[:room]):
            images = prompt.ids.count(getattr(self.processor, "image_token_id", None) or -1)
            raise InputError(
                f"{where}: the prompt takes {len(prompt.ids)} tokens, {images} of them for images, and "
                f"max_length {self.max_length} leaves no room for a completion; raise --max_length or "
                "shorten the prompt"
            )
        return Completion(completion.ids[:room], completion.scored[:room])


def render(processor: ProcessorMixin, example: VisionExample) -> Texts:
    """The example's texts by the chat template; InputError if it leaves an image out."""
    prompt, token = example["prompt"], getattr(processor, "image_token", None)
    openings = [
        _turn(processor, [*prompt, *completion], len(prompt)) for completion in example["completions"]
    ]
    text = openings[0][0]
    for other, _ in openings[1:]:
        text = _common_start(text, other)
    if token is not None and text.count(token) != len(example["images"]):
        raise InputError(
            f"{example['where']} has {len(example['images'])} images, but the chat template writes "
            f"{text.count(token)} placeholders {token!r} for them; use a processor whose template renders "
            "images"
        )
    return Texts(text, [_parts(processor, prompt, answers, text) for answers in example["completions"]])


def encode_prompt(processor: Any, text: str, images: Sequence[Any]) -> Prompt:
    """The tokens and tensors of a prompt that the template has written."""
    made = processor(
        text=[text],
        images=[list(images)] if images else None,
        add_special_tokens=False,  # the template has written its own; BOS is added below where it did not
        return_tensors="pt",
    )
    shape = made["input_ids"].shape
    kinds = {name: value[0].tolist() for name, value in made.items() if value.shape == shape}
    del kinds["attention_mask"]
    ids = kinds.pop("input_ids")
    if needs_bos(processor.tokenizer, ids):
        ids.insert(0, processor.tokenizer.bos_token_id)
        for values in kinds.values():
            values.insert(0, 0)
    tensors = {name: value for name, value in made.items() if value.shape != shape}
    return Prompt(ids, kinds, tensors if images else {})


def encode_completion(tokenizer: Any, prompt: str, parts: Sequence[Part]) -> Completion:
    """The tokens of a completion's parts, one after another; an answer is scored with its end."""
    before, ids, scored = prompt, list[int](), list[bool]()
    for part in parts:
        new = completion_ids(tokenizer, before, part.text) if part.scored else None
        new = _ids_after(tokenizer, before, part.text) if new is None else new
        ids += new
        scored += [part.scored] * len(new)
        before += part.text
    return Completion(ids, scored)


def completion_ids(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """Token ids of an answer that follows a prompt, closed by EOS or by the template.

    In the prompt an image is one bare placeholder. The ids are what the tokenizer adds for the completion
    when it reads both together: a SentencePiece tokenizer begins a text that it reads alone with a space.
    """
    ids = _ids_after(tokenizer, prompt, completion)
    if not _is_closed(tokenizer, ids):
        ids = [*_ids_after(tokenizer, prompt, completion.rstrip()), tokenizer.eos_token_id]
    return ids


def needs_bos(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the tokenizer would begin these ids with BOS and the template has not."""
    bos = tokenizer.bos_token_id
    return bos is not None and ids[:1] != [bos] and tokenizer("").input_ids[:1] == [bos]


def _parts(processor: ProcessorMixin, prompt: list[dict], answers: list[dict], start: str) -> list[Part]:
    """The stretches of a completion after the prompt's text: answers, and the turns between them."""
    messages, parts, before, done = [*prompt, *answers], list[Part](), start, len(start)
    for place in range(len(prompt), len(messages), 2):
        opened, finished = _turn(processor, messages, place)
        if not finished.startswith(before):
            raise InputError(
                "the chat template writes earlier turns otherwise once others follow, so a conversation of "
                "several answers cannot be scored; make each answer a row of its own"
            )
        before, begin = finished, done if place == len(prompt) else len(opened)
        parts += [Part(finished[done:begin], False)] if begin > done else []
        parts.append(Part(finished[begin:], True))
        done = len(finished)
    return parts


def _turn(processor: ProcessorMixin, messages: list[dict], place: int) -> tuple[str, str]:
    """The conversation up to where the answer `messages[place]` begins, and up to where it ends."""
    template: Any = processor.apply_chat_template
    opened = template(messages[:place], tokenize=False, add_generation_prompt=True)
    finished = template(messages[: place + 1], tokenize=False)
    # Some templates open the answer with a tag that they leave out of a finished one.
    return _common_start(opened, finished), finished


def _common_start(one: str, other: str) -> str:
    end = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:end]


def _ids_after(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    texts = [prompt, prompt + completion, completion]
    before, both, alone = tokenizer(texts, add_special_tokens=False).input_ids
    return both[len(before) :] if both[: len(before)] == before else alone


def _is_closed(tokenizer: Any, ids: list[int]) -> bool:
    """Whether a special token ends the ids, but for white space, such as the line end after <|im_end|>."""
    known: Mapping[int, Any] = tokenizer.added_tokens_decoder
    for token in reversed(ids):
        if token in known and known[token].special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False
