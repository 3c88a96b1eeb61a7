"""Messages, checked: known roles, contents as blocks, an image block for each image, no empty answer.

A message is {role, content} or {from, value}; a content is text or a list of blocks, each a text or an image.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from reprlib import repr as shortened
from typing import Any

from prefopt.errors import InputError

PLACEHOLDER = "<image>"
# What a role is called in the formats.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def messages_of(value: Any, role: str, where: str) -> list[dict]:
    """A cell's messages; a text alone is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where} is {shortened(value)}; it is to be text or a list of messages")
    return [_message(message, where) for message in messages]


def _message(message: Any, where: str) -> dict:
    said = _without_none(message)
    role, content = (
        (said.get("role", said.get("from")), said.get("content", said.get("value")))
        if isinstance(said, dict)
        else (None, None)
    )
    if role is None or content is None:
        raise InputError(f"{where} has the message {shortened(said)}; a message has a role and a content")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where} has a message of {shortened(role)}; roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = [_without_none(block) for block in content]
    elif not isinstance(content, str):
        raise InputError(
            f"{where} has the content {shortened(content)}; it is to be text or a list of blocks"
        )
    return {"role": ROLES[role], "content": content}


def _without_none(value: Any) -> Any:
    """Arrow gives every message, and every block, the keys of all others, with None."""
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if part is not None}


def place_images(messages: list[dict], images: int, where: str, image_token: str) -> list[dict]:
    """The prompt's messages as lists of blocks, with one image block for each image.

    A prompt that does not end with the user's message, a system message that is not the first, and
    placeholders that are not as many as the images or not in their order are an InputError.
    """
    prompt = [_in_blocks(message, where, image_token) for message in messages]
    if prompt[-1]["role"] != "user":
        raise InputError(
            f"{where} ends with a message of {prompt[-1]['role']!r}; it is to end with the user's"
        )
    if any(message["role"] == "system" for message in prompt[1:]):
        raise InputError(f"{where} has a message of 'system' that is not the first")
    blocks = [block for old in messages if isinstance(old["content"], list) for block in old["content"]]
    numbers = [block["index"] for block in blocks if block["type"] == "image" and "index" in block]
    if numbers != list(range(len(numbers))):
        raise InputError(f"{where} shows its images in the order {numbers}; put the column in this order")
    placeholders = sum(block["type"] == "image" for message in prompt for block in message["content"])
    plain = [i for i, old in enumerate(messages) if old["role"] == "user" and isinstance(old["content"], str)]
    if plain and not placeholders:
        prompt[plain[0]]["content"][:0] = [{"type": "image"} for _ in range(images)]
    elif placeholders != images:
        raise InputError(
            f"{where} has {placeholders} image placeholders, and the row has {images} images; "
            "give each image its placeholder"
        )
    return prompt


def check_completion(messages: list[dict], where: str, image_token: str, *, turns: bool) -> list[dict]:
    """A completion's messages as lists of text blocks.

    It is one message of the assistant, or with `turns` several, which end with one and take turns with the
    user's; an image or an empty answer is an InputError.
    """
    if len(messages) > 1 and not turns:
        raise InputError(f"{where} has {len(messages)} messages; it is to be text or one assistant message")
    completion = [_in_blocks(message, where, image_token) for message in messages]
    roles = [message["role"] for message in completion]
    if roles[0] != "assistant":
        raise InputError(f"{where} is a message of {roles[0]!r}; it is to be one of 'assistant'")
    if roles[-1] != "assistant":
        raise InputError(f"{where} ends with a message of {roles[-1]!r}; it is to end with the assistant's")
    for before, role in pairwise(roles):
        if {before, role} != {"assistant", "user"}:
            raise InputError(f"{where} has {role!r} after {before!r}; assistant and user are to take turns")
    for message in completion:
        if any(block["type"] != "text" for block in message["content"]):
            raise InputError(
                f"{where} holds an image placeholder; only a prompt, what comes before the first answer, can "
                "show images"
            )
        if message["role"] == "assistant" and not text_of(message):
            raise InputError(f"{where} is empty; a completion needs at least one word in every answer")
    return completion


def text_of(message: dict) -> str:
    """The texts of a message, without its images and the space around them."""
    between = "" if message["role"] == "assistant" else "\n"  # where a prompt's images stood
    return between.join(block["text"] for block in message["content"] if block["type"] == "text").strip()


def question_of(prompt: Sequence[dict]) -> str:
    """What a critic is told that was asked: a prompt's texts, with the roles if it has several messages."""
    said = [(message["role"], text_of(message)) for message in prompt if text_of(message)]
    return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {text}" for role, text in said)


def _in_blocks(message: dict, where: str, image_token: str) -> dict:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    # An answer may speak of <image>, unless that is what the processor reads as an image.
    tokens = {image_token} if message["role"] == "assistant" else {image_token, PLACEHOLDER}
    parts = [new for old in blocks for new in _blocks(old, where, tokens)]
    return {"role": message["role"], "content": parts}


def _blocks(block: Any, where: str, tokens: set[str]) -> list[dict]:
    """A block as it is, or a text parted at the image tokens that it spells out, without their line ends."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "image" and "image" in block:
        raise InputError(f"{where} carries an image inside of a message; put it into the column images")
    if kind == "image" and not block.get("text"):
        return [{"type": "image"}]
    if kind != "text" or not isinstance(block.get("text"), str):
        raise InputError(
            f"{where} has the block {shortened(block)}; a block is of type 'text', with a text, or 'image'"
        )
    texts = re.split("|".join(map(re.escape, tokens)), block["text"])
    if len(texts) == 1:
        return [{"type": "text", "text": block["text"]}]
    blocks: list[dict] = []
    for part in texts:
        blocks += [{"type": "text", "text": part.strip("\n")}] if part.strip("\n") else []
        blocks.append({"type": "image"})
    return blocks[:-1]
