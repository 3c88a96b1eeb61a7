"""From flags and a table to a denoiser and its encoded examples: what every diffusion recipe begins with."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from prefopt.adapters import LoraArguments, lora_config
from prefopt.diffusion.denoiser import ATTENTION, Denoiser
from prefopt.diffusion.latents import EncodedCandidates, Encoder, scaling_of
from prefopt.diffusion.sampling import load_pipeline
from prefopt.records import InputError, Table
from prefopt.store import writing
from prefopt.trainer import PreferenceConfig, PreferenceTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DiffusionConfig(PreferenceConfig, LoraArguments):
    """The flags that diffusion recipes share."""

    model_name_or_path: str = field(
        default="pocket", metadata={"help": "A diffusers pipeline: a folder, a hub id, or `pocket`."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the hub."})
    dataset_name: str = field(default="pocket", metadata={"help": "A folder, a hub id, or `pocket`."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the hub."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Revision of the dataset on the hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})
    resolution: int | None = field(
        default=None,
        metadata={"help": "Pixels of a side after resizing and cropping (default: the model's own)."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Of the frozen weights; trained ones stay float32. --bf16 and --fp16 set the arithmetic."
        },
    )
    flip_probability: float = field(
        default=0.0, metadata={"help": "Chance that an item's images are mirrored."}
    )
    drop_probability: float = field(
        default=0.0, metadata={"help": "Chance that an item's caption is left empty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        for name in ("flip_probability", "drop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} is {getattr(self, name)}; a probability lies between 0 and 1")
        if self.adapter_name_or_path and not self.use_peft:
            raise InputError("--adapter_name_or_path trains that adapter on; leave out --no_use_peft")
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32")


def prepare(config: DiffusionConfig, table: Table) -> tuple[Denoiser, EncodedCandidates]:
    """The denoiser to train and the table's encoded examples; VAE and text encoders are gone afterwards."""
    dtype = DTYPES[config.dtype]
    pipeline = load_pipeline(config.model_name_or_path, revision=config.model_revision, dtype=dtype)
    if dtype == torch.float16:
        pipeline.vae.float()  # SDXL's VAE overflows in float16
    denoiser = Denoiser(pipeline)
    resolution = config.resolution or denoiser.unet.config["sample_size"] * pipeline.vae_scale_factor
    if resolution % pipeline.vae_scale_factor:
        raise InputError(
            f"--resolution {resolution} is no multiple of {pipeline.vae_scale_factor}, the VAE's reduction"
        )
    if config.adapter_name_or_path:
        denoiser.start_from_lora(pipeline, config.adapter_name_or_path)
    elif config.use_peft:
        torch.manual_seed(config.seed)  # the adapter's random factor is the same on every process
        denoiser.add_lora(lora_config(config, ATTENTION))
    else:
        denoiser.unet.requires_grad_(True)
    examples = _encode(config, table, pipeline, resolution)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipeline, part):
            setattr(pipeline, part, None)
    gc.collect()
    return denoiser, examples


def _encode(config: DiffusionConfig, table: Table, pipeline: Any, resolution: int) -> EncodedCandidates:
    cache_dir = Path(config.cache_dir or Path(config.output_dir, "cache"))
    encoder = Encoder(pipeline, cache_dir, resolution)
    for part in (pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.eval().to(PartialState().device)
    return EncodedCandidates(
        table,
        encoder.images(table, mirrored=config.flip_probability > 0),
        encoder.prompts(table.facts.unique("prompt")),
        scaling=scaling_of(pipeline),
        seed=config.seed,
        flip_probability=config.flip_probability,
        drop_probability=config.drop_probability,
    )


def save_pipeline(trainer: PreferenceTrainer) -> None:
    """After full fine-tuning, put the model's other parts beside the saved UNet, so that it is a pipeline."""
    config = trainer.args
    if not isinstance(config, DiffusionConfig) or config.use_peft or not trainer.is_world_process_zero():
        return
    pipeline = load_pipeline(config.model_name_or_path, revision=config.model_revision)
    trained = Path(str(config.output_dir), "unet")
    pipeline.unet = type(pipeline.unet).from_pretrained(trained, use_safetensors=True)
    with writing(config.output_dir):
        pipeline.save_pretrained(config.output_dir)


def denoising_scores(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Scores (batch, k) of a batch of encoded candidates through the model that the trainer hands over."""
    return model(batch["latents"], batch["noise"], batch["time"], batch["conditioning"])
