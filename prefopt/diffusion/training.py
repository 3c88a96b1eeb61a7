"""From a config and a table to a trained model: what every diffusion recipe does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from prefopt import pocket
from prefopt.adapters import lora_config
from prefopt.diffusion.config import DiffusionConfig
from prefopt.diffusion.denoiser import Denoiser, denoising_metrics
from prefopt.diffusion.latents import EncodedCandidates, Encoder
from prefopt.diffusion.lora import add_lora, start_from_lora
from prefopt.diffusion.sampling import load_pipeline
from prefopt.errors import InputError
from prefopt.files import reporting_write_errors
from prefopt.objectives import Objective, Scored
from prefopt.records import Table
from prefopt.reference import frozen_copy
from prefopt.trainer import PreferenceTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_table(read: Callable[..., Table], config: DiffusionConfig) -> Table:
    """The table of the options, read by the first process, then by the others from its cache."""
    with PartialState().main_process_first():
        table = read(
            pocket.resolve(str(config.dataset_name), "pairs"),
            split=config.dataset_train_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
        )
    PartialState().print(table)
    return table


def train(
    config: DiffusionConfig, table: Table, objective: Objective, about: Callable[[str], Mapping[str, str]]
) -> PreferenceTrainer:
    """Load, encode, train, save; `about(prediction)` returns facts for config.json.

    InputError for labels or options that the objective cannot use, before anything is loaded.
    """
    objective.check_labels(table.soft_labels)
    if config.reference == "cache" and not objective.needs_reference:
        raise InputError("--reference cache: this objective has no reference")
    denoiser, examples = prepare(config, table)
    frozen = objective.needs_reference and not config.use_peft and config.reference == "live"
    trainer = PreferenceTrainer(
        denoiser,
        config,
        score=DenoisingScore(predict_clean="clean" in objective.needs),
        objective=objective,
        metrics=denoising_metrics,
        train_dataset=examples,
        reference_model=frozen_copy(denoiser) if frozen else None,
        about=about(denoiser.schedule.prediction),
    )
    trainer.train()
    trainer.save_model()
    if not config.use_peft and trainer.is_world_process_zero():
        save_pipeline(config)
    return trainer


@dataclass
class DenoisingScore:
    """Scores of a batch of encoded candidates through the model that the trainer hands over."""

    predict_clean: bool = False
    gives: frozenset[str] = frozenset({"nll", "clean"})

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Scored:
        """Scores (batch, k), the denoising errors as `nll`, and the predicted clean latents if wanted."""
        return model(
            batch["latents"], batch["noise"], batch["time"], batch["conditioning"], self.predict_clean
        )


def prepare(config: DiffusionConfig, table: Table) -> tuple[Denoiser, EncodedCandidates]:
    """The denoiser to train and the table's encoded examples; the frozen parts are freed afterwards."""
    dtype = DTYPES[config.dtype]
    pipeline: Any = load_pipeline(config.model_name_or_path, revision=config.model_revision, dtype=dtype)
    if dtype == torch.float16:
        pipeline.vae.float()  # SDXL's VAE overflows in float16
    denoiser = Denoiser(pipeline)
    family, network = denoiser.family, denoiser.network
    resolution = config.resolution or network.config["sample_size"] * pipeline.vae_scale_factor
    if resolution % pipeline.vae_scale_factor:
        raise InputError(
            f"--resolution {resolution} is no multiple of {pipeline.vae_scale_factor}, the VAE's reduction"
        )
    if config.adapter_name_or_path:
        start_from_lora(network, pipeline, config.adapter_name_or_path)
    elif config.use_peft:
        torch.manual_seed(config.seed)  # the adapter's random factor is the same on every process
        add_lora(network, lora_config(config, list(family.lora_targets)))
    else:
        network.requires_grad_(True)
    frozen = ("vae", *family.text_encoders)
    for part in frozen:
        getattr(pipeline, part).eval().to(PartialState().device)
    encoder = Encoder(
        pipeline, Path(config.cache_dir or Path(str(config.output_dir), "cache")), resolution, family
    )
    examples = EncodedCandidates(
        table,
        encoder.images(table, mirrored=config.flip_probability > 0),
        encoder.prompts(table.facts.unique("prompt")),
        scaling=family.scaling(pipeline),
        per_candidate=family.per_candidate,
        seed=config.seed,
        flip_probability=config.flip_probability,
        drop_probability=config.drop_probability,
    )
    for part in frozen:
        setattr(pipeline, part, None)
    gc.collect()
    return denoiser, examples


def save_pipeline(config: DiffusionConfig) -> None:
    """After full fine-tuning, put the model's other parts beside the saved network: a whole pipeline."""
    pipeline: Any = load_pipeline(config.model_name_or_path, revision=config.model_revision)
    family = Denoiser(pipeline).family
    kind: Any = type(family.network(pipeline))
    trained = kind.from_pretrained(Path(str(config.output_dir), family.component), use_safetensors=True)
    setattr(pipeline, family.component, trained)
    with reporting_write_errors(config.output_dir):
        pipeline.save_pretrained(config.output_dir)
