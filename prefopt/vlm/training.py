"""From flags to a policy, its processor and its pairs: what recipes on vision-language models share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import ProcessorMixin

from prefopt.adapters import LoraArguments
from prefopt.records import InputError
from prefopt.trainer import PreferenceConfig
from prefopt.vlm.models import add_lora, load_vlm, start_from_lora
from prefopt.vlm.pairs import VisionPairs, read_vision_pairs


@dataclass
class VlmConfig(PreferenceConfig, LoraArguments):
    """The flags that recipes on vision-language models share."""

    model_name_or_path: str = field(
        default="", metadata={"help": "A vision-language model: a folder or a hub id."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the hub."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ... (default: the best there is)."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Of the frozen weights; trained ones stay float32. For the arithmetic, --bf16 and --fp16."
        },
    )
    dataset_name: str = field(default="", metadata={"help": "Vision preference pairs: a folder or a hub id."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the hub."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Revision of the dataset on the hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a prompt, its images and a completion, which is cut (default: any)."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers of the language model that get an adapter (default: all linear ones)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter is used in every forward
        for name in ("model_name_or_path", "dataset_name"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing; name a folder or a hub id")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"--max_length is {self.max_length}; it is a number of tokens")
        if self.reference == "cache":
            raise InputError(
                "--reference cache is for diffusion models; on this side scores are made in the step"
            )
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(
                f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32, with --bf16"
            )


def prepare(config: VlmConfig) -> tuple[nn.Module, ProcessorMixin, VisionPairs]:
    """The model to train, its processor, and the checked pairs."""
    model, processor = load_vlm(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    )
    pairs = read_vision_pairs(
        config.dataset_name,
        split=config.dataset_train_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
        image_token=getattr(processor, "image_token", "<image>"),
    )
    if config.use_peft and config.adapter_name_or_path:
        return start_from_lora(model, config.adapter_name_or_path), processor, pairs
    if not config.use_peft:
        return model, processor, pairs
    torch.manual_seed(config.seed)  # the adapter's random factor is the same on every process
    return add_lora(model, config), processor, pairs
