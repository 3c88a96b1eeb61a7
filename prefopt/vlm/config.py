"""The options that recipes on vision-language models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config import DatasetArguments, LoraArguments, PreferenceConfig
from prefopt.errors import InputError
from prefopt.options import check_interval, check_paths_exist, option


@dataclass
class VlmConfig(PreferenceConfig, LoraArguments, DatasetArguments):
    """transformers' TrainingArguments with the model, its data and how both are read."""

    model_name_or_path: str = option("", "A vision-language model: a folder or a hub id.")
    model_revision: str | None = option(None, "Revision of the model on the hub.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ... (default: the best there is)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Of the frozen weights; trained ones stay float32. --bf16 and --fp16 set the arithmetic."
    )
    dataset_name: str | None = option(None, "Vision preference pairs: a folder or a hub id.")
    max_length: int | None = option(
        None, "Most tokens of prompt, images and completion: longer ones are cut (default: no limit)."
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers of the language model that get an adapter (default: all linear ones)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter is used in every forward
        for name in ("model_name_or_path", "dataset_name"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing; name a folder or a hub id")
        check_paths_exist(self, "model_name_or_path", "dataset_name", "adapter_name_or_path")
        check_interval(self, "[1, inf)", "max_length")
        if self.reference == "cache":
            raise InputError(
                "--reference cache is for diffusion models; on this side reference scores are computed live"
            )
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32")
