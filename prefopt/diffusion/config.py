"""The options that diffusion recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt import pocket
from prefopt.config import DatasetArguments, LoraArguments, PreferenceConfig
from prefopt.errors import InputError
from prefopt.options import check_interval, check_paths_exist, option


@dataclass
class DiffusionConfig(PreferenceConfig, LoraArguments, DatasetArguments):
    """transformers' TrainingArguments with the model, its data and how its images are read."""

    model_name_or_path: str = option("pocket", "A diffusers pipeline: a folder, a hub id, or `pocket`.")
    model_revision: str | None = option(None, "Revision of the model on the hub.")
    resolution: int | None = option(
        None, "Pixels of a side after resizing and cropping (default: the model's own)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Of the frozen weights; trained ones stay float32. --bf16 and --fp16 set the arithmetic."
    )
    flip_probability: float = option(0.0, "Probability that an example's images are mirrored.")
    drop_probability: float = option(0.0, "Probability that an example's prompt is left empty.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        pocket.fill_defaults(self, self.model_name_or_path, "dataset_name")
        check_paths_exist(self, "model_name_or_path", "dataset_name", "adapter_name_or_path")
        check_interval(self, "[0, 1]", "flip_probability", "drop_probability")
        if self.adapter_name_or_path and not self.use_peft:
            raise InputError("--adapter_name_or_path trains that adapter; leave out --no_use_peft")
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32")
