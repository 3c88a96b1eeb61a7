"""Images from any text-to-image pipeline, each a function of its own prompt and seed.

Left out: the safety checker. It replaces an image by black without a word, and a black image would be scored
as if the model had generated it. It is never loaded here; put one back around whatever serves images to
people.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from prefopt.diffusion.generator import Generator, Sampler, adapter_file, pipeline_folder
from prefopt.diffusion.lora import load_adapter, set_adapter_scale
from prefopt.errors import InputError
from prefopt.files import make_readable, reporting_write_errors
from prefopt.loading import UNUSABLE, load_parts, not_loaded
from prefopt.model_files import MODEL_FILE, read_config


def load_pipeline(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """The pipeline of a folder, hub id or `pocket`; safetensors only, and all of them.

    Raises InputError for a model that is missing or damaged.
    """
    folder = pipeline_folder(model_name_or_path, revision=revision, variant=variant)
    index = read_config(folder, MODEL_FILE)
    parts = load_parts(index, folder, dtype, variant)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **parts
        )
    except UNUSABLE as error:
        raise not_loaded("pipeline", model_name_or_path, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_generator(generator: Generator, device: str | torch.device = "cpu") -> Any:
    """The pipeline of a generator, with its adapter at its scale; one that does not fit is an InputError."""
    file = adapter_file(generator.adapter) if generator.adapter is not None else None
    pipeline = load_pipeline(
        generator.model,
        revision=generator.revision,
        variant=generator.variant,
        dtype=getattr(torch, generator.dtype),
    )
    if file is not None:
        load_adapter(pipeline, file)
        set_adapter_scale(pipeline, generator.adapter_scale)
    return pipeline.to(device)


def save_pipeline(pipeline: Any, component: str, folder: Path) -> None:
    """Put the other parts of a pipeline beside its fully trained `component` in a folder: a whole one."""
    kind = type(getattr(pipeline, component))
    setattr(pipeline, component, kind.from_pretrained(folder / component, use_safetensors=True))
    with reporting_write_errors(folder):
        pipeline.save_pretrained(folder)
    make_readable(*folder.glob("*/*.safetensors"))


def sample(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, *, batch_size: int = 8
) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in their order.

    Each image has its own generator, on the CPU so that a seed means the same noise on every device: an image
    can be made again alone, equal up to the kernels' rounding. Raises InputError for prompts that are no text
    and for images that are not finite.
    """
    arrays = sample_arrays(pipeline, prompts, seeds, sampler, batch_size=batch_size)
    for array, prompt, seed in zip(arrays, prompts, seeds, strict=True):
        if not np.isfinite(array).all():
            raise InputError(
                f"the model generated values that are not finite for {prompt!r}, seed {seed}: "
                "half precision overflows in some VAEs; try bfloat16 or float32"
            )
        yield to_image(array)


def sample_arrays(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, *, batch_size: int = 8
) -> Iterator[np.ndarray]:
    """The arrays behind the images of `sample`: (height, width, 3) in 0..1, finite or not."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: each image needs one of each")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i} is {type(prompt).__name__}, not text: {prompt!r}")
    _check_steps(pipeline.scheduler, sampler.num_inference_steps)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[batch]]
        given = {"prompt": list(prompts[batch]), "generator": generators, **asdict(sampler)}
        yield from pipeline(**given, output_type="np").images


def _check_steps(scheduler: Any, steps: int) -> None:
    """InputError for more denoising steps than the scheduler has timesteps."""
    settings = scheduler.config
    known = ("num_train_timesteps", "original_inference_steps")  # the second is that of LCM
    limit = min((settings[name] for name in known if settings.get(name)), default=steps)
    if steps > limit:
        raise InputError(
            f"{steps} denoising steps are more than the {limit} that this model's {type(scheduler).__name__} "
            "takes: lower --num_inference_steps (of --sources: steps; of validation images: "
            "--validation_inference_steps)"
        )


def to_image(array: np.ndarray) -> Image.Image:
    """An RGB image of finite values in 0..1."""
    return Image.fromarray((array * 255).round().astype(np.uint8))
