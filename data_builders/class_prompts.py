"""The prompts of a self-rewarding build, each with its class: from a file, or written by an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_builders.prompts import class_of, identify, lines
from data_builders.self_rewarding_config import SelfRewardingConfig
from data_builders.stages import Record
from prefopt.records import InputError


def prompts_of(config: SelfRewardingConfig, folder: Path, device: Any) -> list[Record]:
    """Records with `prompt`, `prompt_id` and `class`; held-out prompts go to `folder`/held_out_prompts.txt."""
    if config.prompts is None:
        raise InputError("not yet")
    texts = list(lines(Path(config.prompts)))
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"{config.prompts} has {twice!r} more than once; keep one")
    return [prompt | {"class": class_of(prompt["prompt"], config.classes)} for prompt in identify(texts)]
