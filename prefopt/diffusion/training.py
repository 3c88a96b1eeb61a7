"""From a config and a table to a trained model: what every diffusion recipe does."""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn

from prefopt import pocket
from prefopt.config import PreferenceConfig
from prefopt.diffusion.candidates import Candidates, EncodeInStep, LiveCandidates, encode_candidates
from prefopt.diffusion.config import DiffusionConfig, ImageArguments
from prefopt.diffusion.denoiser import Denoiser, denoising_metrics
from prefopt.diffusion.discriminator import DiscriminatedDenoiser, load_discriminator
from prefopt.diffusion.families import Family
from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.latents import Encoder
from prefopt.diffusion.lora import make_trainable
from prefopt.diffusion.sampling import load_pipeline, save_pipeline
from prefopt.diffusion.schedule import Times
from prefopt.diffusion.tables import Table
from prefopt.diffusion.validation import ValidationImages
from prefopt.errors import InputError
from prefopt.files import text_lines
from prefopt.objectives import Objective, Scored, with_discriminator
from prefopt.reference import frozen_copy
from prefopt.resuming import check_start
from prefopt.same_run import sampled_key
from prefopt.trainer import PreferenceTrainer


def train(
    config: DiffusionConfig,
    read: Callable[..., Table],
    objective: Objective,
    about: Callable[[str], Mapping[str, str]],
) -> PreferenceTrainer:
    """Read, load, encode, train, save; `about(prediction)` returns facts for config.json.

    InputError for labels or options that the objective cannot use, before anything is loaded.
    """
    state = PartialState()
    check_start(config)
    with state.main_process_first():  # then the others read its cache
        tables = read_tables(config, read)
    for table, use in zip(tables, ("to train on", "held out"), strict=False):
        state.print(f"{table} {use}")
        objective.check_labels(table.soft_labels)
    if config.reference == "cache" and not objective.needs_reference:
        raise InputError("--reference cache: this objective has no reference")
    if config.discriminator_name_or_path:
        objective = with_discriminator(objective, config.discriminator_weight)
    if config.encode == "cache" and config.first_rows(len(tables[0])) is not None:
        state.print(
            "this run reads no example twice: --encode live would encode each in its step and keep nothing"
        )
    pipeline, denoiser, (examples, *held_out), encode_in_step, around = prepare(config, tables)
    frozen = objective.needs_reference and not config.use_peft and config.reference == "live"
    adversarial = config.discriminator_mode == "adversarial"
    trainer = PreferenceTrainer(
        denoiser,
        config,
        score=DenoisingScore(bool(config.discriminator_name_or_path)),
        prepare=encode_in_step,
        objective=objective,
        metrics=partial(denoising_metrics, schedule=denoiser.schedule),
        train_dataset=examples,
        eval_dataset=held_out[0] if held_out else None,
        reference_model=frozen_copy(denoiser) if frozen else None,
        apart={"discriminator": config.discriminator_learning_rate} if adversarial else {},
        about=about(denoiser.schedule.prediction),
        made_of={"rows (SHA-256)": tables[0].key(), **around},
    )
    if config.validation_prompts:
        trainer.add_callback(_validation(config, trainer, pipeline, denoiser.family))
    trainer.train()
    trainer.save_model()
    if not config.use_peft and trainer.is_world_process_zero():
        folder, component = Path(str(config.output_dir)), denoiser.family.component
        save_pipeline(_base(config), component, folder)
    return trainer


def read_tables(config: DiffusionConfig, read: Callable[..., Table]) -> list[Table]:
    """The table to train on and, if the options hold examples out, the one that is measured."""
    source = pocket.resolve(str(config.dataset_name), "pairs")
    options = {"config": config.dataset_config, "revision": config.dataset_revision}
    splits = [config.dataset_train_split, *filter(None, [config.dataset_test_split])]
    tables = [read(source, split=split, **options) for split in splits]
    if config.test_fraction is not None:
        tables = list(tables[0].divide(config.test_fraction))
    return [tables[0].first(config.max_train_samples), *tables[1:]]


class Prepared(NamedTuple):
    """What a run trains, and on what."""

    pipeline: Any
    denoiser: Denoiser  # of the pipeline
    examples: Sequence[Candidates]  # of each table
    encode_in_step: EncodeInStep | None  # None: the examples are encoded
    around: Mapping[str, str]  # the keys of what the weights depend on around the denoiser


def prepare(config: DiffusionConfig, tables: Sequence[Table]) -> Prepared:
    """Load the model, make what is trained trainable, and encode each table's examples.

    The frozen parts are freed once all is encoded; if there are prompts for validation they wait on the CPU.

    The first table is trained on: of it only the rows that the run reads are encoded, and the times of the
    others are not spread over its steps.
    """
    pipeline = _base(config, dtype=getattr(torch, config.dtype))
    denoiser = _denoiser(config, pipeline)
    torch.manual_seed(config.seed)  # a fresh adapter's random factor is the same on every process
    make_trainable(denoiser.network, pipeline, config, denoiser.family.lora_targets)
    encoder = encoder_of(config, config, pipeline, denoiser.family)
    frozen = [getattr(pipeline, part) for part in _frozen(denoiser.family)]
    around = {"VAE and text encoders (SHA-256)": sampled_key(*frozen), **denoiser.schedule.identity}
    train_table, *others = tables
    if config.encode == "live":
        make, rows = partial(LiveCandidates, encoder=encoder), {}
    else:
        make, rows = partial(encode_candidates, encoder), {"rows": config.first_rows(len(train_table))}
    chances = chances_of(config, config)
    examples = [
        make(table=train_table, strata=_strata(config), **rows, **chances),
        *(make(table=table, **chances) for table in others),
    ]
    if config.encode == "live":
        return Prepared(pipeline, denoiser, examples, EncodeInStep(encoder), around)
    if config.validation_prompts:
        for part in frozen:
            part.to("cpu")
    else:
        del frozen
        free(pipeline, denoiser.family)
    return Prepared(pipeline, denoiser, examples, None, around)


def _base(config: DiffusionConfig, **options: Any) -> Any:
    """The pipeline that the options name, before training."""
    return load_pipeline(
        config.model_name_or_path, revision=config.model_revision, variant=config.variant, **options
    )


def encoder_of(config: PreferenceConfig, images: ImageArguments, pipeline: Any, family: Family) -> Encoder:
    """The pipeline's frozen parts, on this process's device, and where their results are cached."""
    if pipeline.vae.dtype == torch.float16:
        pipeline.vae.float()  # SDXL's VAE overflows in float16
    network: Any = family.network(pipeline)
    resolution = images.resolution or network.config["sample_size"] * pipeline.vae_scale_factor
    if resolution % pipeline.vae_scale_factor:
        raise InputError(
            f"--resolution {resolution} is no multiple of {pipeline.vae_scale_factor}, the VAE's reduction"
        )
    for part in _frozen(family):
        getattr(pipeline, part).eval().to(PartialState().device)
    return Encoder(
        pipeline, Path(config.cache_dir or Path(str(config.output_dir), "cache")), resolution, family
    )


def chances_of(config: PreferenceConfig, images: ImageArguments) -> dict[str, Any]:
    """What decides an example's draws."""
    return {
        "seed": config.seed,
        "flip_probability": images.flip_probability,
        "drop_probability": images.drop_probability,
    }


def free(pipeline: Any, family: Family) -> None:
    """Drop the parts that encode: nothing needs them in the steps."""
    for part in _frozen(family):
        setattr(pipeline, part, None)
    gc.collect()


def _frozen(family: Family) -> tuple[str, ...]:
    return "vae", *family.text_encoders


def _validation(
    config: DiffusionConfig, trainer: PreferenceTrainer, pipeline: Any, family: Family
) -> ValidationImages:
    return ValidationImages(
        trainer,
        pipeline,
        _frozen(family) if config.encode == "cache" else (),
        list(text_lines(Path(str(config.validation_prompts)))),
        Sampler(config.validation_inference_steps, config.validation_guidance_scale),
        every=config.validation_steps,
        batch_size=config.per_device_eval_batch_size,
    )


def _denoiser(config: DiffusionConfig, pipeline: Any) -> Denoiser:
    """The denoiser, with the discriminator of the options if there is one."""
    if not config.discriminator_name_or_path:
        return Denoiser(pipeline, times=_times(config))
    low, high = config.discriminator_window
    return DiscriminatedDenoiser(
        pipeline,
        times=_times(config),
        discriminator=load_discriminator(config.discriminator_name_or_path, pipeline),
        window=(low, high),
        adversarial=config.discriminator_mode == "adversarial",
    )


def _times(config: DiffusionConfig) -> Times:
    low, high = config.timestep_range
    is_normal = config.timestep_distribution == "logit_normal"
    return Times(low, high, (config.logit_mean, config.logit_std) if is_normal else None)


def _strata(config: DiffusionConfig) -> tuple[int, int] | None:
    """The seed of the examples' order and the examples of an optimizer step, if times are stratified."""
    return (config.order_seed, config.global_batch) if config.timestep_distribution == "stratified" else None


class DenoisingScore:
    """Scores of a batch of encoded candidates through the model that the trainer hands over."""

    def __init__(self, has_discriminator: bool = False):
        self.extras = frozenset({"nll", "residual"} | ({"realism_loss"} if has_discriminator else set()))

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Scored:
        """Scores (batch, k), the denoising errors as `nll`, the residuals, and a discriminator's losses."""
        mask = None if batch["mask"].all() else batch["mask"]
        return model(batch["latents"], batch["noise"], batch["time"], batch["conditioning"], mask)
