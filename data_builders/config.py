"""The options that builders share: who draws, how, and where the dataset goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_builders.sources import Source
from prefopt.diffusion.sampling import Sampler
from prefopt.records import InputError


@dataclass
class DrawingConfig:
    """Who draws how many candidates of each prompt, and what is written."""

    candidates: int = field(default=8, metadata={"help": "Images per prompt."})
    seed: int = field(default=0, metadata={"help": "The images' own seeds follow from it."})
    model_name_or_path: str = field(
        default="pocket", metadata={"help": "Who draws: a folder, a hub id or pocket."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that model on the hub."})
    adapter: str | None = field(default=None, metadata={"help": "A LoRA to draw with, folder or file."})
    adapter_scale: float = field(default=1.0, metadata={"help": "The LoRA's weight."})
    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Classifier-free guidance; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Pixels (default: the model's)."})
    width: int | None = field(default=None, metadata={"help": "Pixels (default: the model's)."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of drawing."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images drawn at once."})
    block_size: int = field(default=8, metadata={"help": "Prompts written together: what a crash costs."})
    test_fraction: float = field(default=0.0, metadata={"help": "Share of prompts held out as `test`."})
    shard_megabytes: int = field(default=256, metadata={"help": "Largest Parquet file of an export."})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_inference_steps", "batch_size", "block_size", "shard_megabytes")
        at_least(self, 2, "candidates")
        there(self, "model_name_or_path", "adapter")
        if not 0 <= self.test_fraction < 1:
            raise InputError(f"--test_fraction is {self.test_fraction}; it lies in [0, 1)")
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and (value < 8 or value % 8):
                raise InputError(f"--{name} is {value}; it is a multiple of 8")

    @property
    def source(self) -> Source:
        """Who draws."""
        return Source(
            self.model_name_or_path,
            Sampler(self.num_inference_steps, self.guidance_scale, self.height, self.width),
            self.revision,
            self.adapter,
            self.adapter_scale,
            self.dtype,
        )


def there(config: object, *names: str) -> None:
    """InputError if one of these options is a path, not a hub id, and nothing is there."""
    for name in names:
        value = getattr(config, name) or ""
        is_path = value.startswith((".", "/", "~")) or value.count("/") > 1
        if is_path and not Path(value).exists():
            raise InputError(f"--{name}: there is no {value}")


def at_least(config: object, smallest: float, *names: str) -> None:
    """InputError unless these options, where given, are finite and not below `smallest`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= smallest):
            raise InputError(f"--{name} is {value}; it is {smallest} or more")
