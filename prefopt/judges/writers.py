"""Vision-language models that write replies, greedily: local ones, or behind an OpenAI-compatible server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from prefopt import pocket
from prefopt.endpoint import Endpoint, Unfit, chat_text, in_parallel
from prefopt.files import content_key
from prefopt.images import png_base64
from prefopt.loading import files_identity, own_memory
from prefopt.vlm.generate import Request, generate
from prefopt.vlm.models import load_vlm

LONGEST = 512  # tokens of a reply, unless told


@dataclass(frozen=True)
class Message:
    """Images, and the text after them."""

    images: Sequence[Image.Image]
    text: str


@dataclass(frozen=True)
class Reply:
    """What was written, and whether it ended by itself, not at its longest length."""

    text: str
    finished: bool


class Writer(Protocol):
    """Replies to messages; `identity` changes with all that its replies depend on."""

    identity: str
    name: str
    max_new_tokens: int

    def write(self, messages: Sequence[Message]) -> list[Reply]:
        """The likeliest reply to each message."""
        ...


class LocalWriter:
    """A vision-language model of a folder, a hub id or `pocket`; safetensors only, no code of others."""

    def __init__(
        self,
        model_name_or_path: str = "pocket",
        revision: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
        batch_size: int = 4,
        max_new_tokens: int = LONGEST,
    ):
        self.name = pocket.resolve(str(model_name_or_path), "llava")
        model, self.processor = load_vlm(
            self.name, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model: Any = own_memory(model.eval()).to(device)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.identity = local_identity(model_name_or_path, revision, dtype, max_new_tokens)

    def write(self, messages: Sequence[Message]) -> list[Reply]:
        """The likeliest reply to each message."""
        requests = [
            Request(
                [image.convert("RGB") for image in message.images],
                [{"role": "user", "content": _blocks([{"type": "image"} for _ in message.images], message)}],
                number,
            )
            for number, message in enumerate(messages)
        ]
        replies = generate(
            self.model,
            self.processor,
            requests,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            batch_size=self.batch_size,
        )
        return [Reply(reply.text, reply.finished) for (reply,) in replies]


def local_identity(
    model_name_or_path: str, revision: str | None, dtype: torch.dtype, max_new_tokens: int
) -> str:
    """All that a local model's replies depend on but for rounding, from its files: nothing is loaded."""
    files = files_identity(pocket.resolve(str(model_name_or_path), "llava"), revision)
    return f"writer {content_key(json.dumps([files, str(dtype), max_new_tokens]))}"


CHAT = "/v1/chat/completions"


class EndpointWriter:
    """A model behind POST /v1/chat/completions of a server at `url`; images travel as PNG in data addresses.

    The identity holds the model's name, not the address: a new model needs a new name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_new_tokens: int = LONGEST,
        concurrency: int = 8,
        retries: int = 10,
        timeout: float = 300.0,
    ):
        self.endpoint = Endpoint(url, retries=retries, timeout=timeout)
        self.name, self.max_new_tokens, self.concurrency = model, max_new_tokens, concurrency
        self.identity = f"endpoint writer {json.dumps([model, max_new_tokens])}"

    def write(self, messages: Sequence[Message]) -> list[Reply]:
        """The likeliest reply to each message; up to `concurrency` requests at a time."""
        return in_parallel(self._one, messages, self.concurrency)

    def _one(self, message: Message) -> Reply:
        urls = [f"data:image/png;base64,{png_base64(image)}" for image in message.images]
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": _blocks(images, message)}],
            "temperature": 0.0,
            "max_tokens": self.max_new_tokens,
        }
        try:
            return Reply(*self.endpoint.post(CHAT, body, chat_text))
        except Unfit as error:
            raise Unfit(f"{self.endpoint.url}{CHAT} of {self.name}: {error}") from error


def _blocks(images: list[dict], message: Message) -> list[dict]:
    return [*images, {"type": "text", "text": message.text}]
