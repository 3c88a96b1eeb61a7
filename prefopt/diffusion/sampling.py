"""Images from any text-to-image pipeline, each a function of its own prompt and seed.

Left out: the safety checker. It replaces an image by black without a word, and a black image would be scored
as if the model had generated it. It is never loaded here; put one back around whatever serves images to
people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from prefopt.diffusion.generator import Generator, pipeline_folder
from prefopt.diffusion.lora import load_adapter, set_adapter_scale
from prefopt.errors import InputError
from prefopt.loading import UNUSABLE, load_complete


def load_pipeline(
    model_name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """The pipeline of a folder, hub id or `pocket`; safetensors only; with the LoRA `adapter` if given.

    Raises InputError for a model or an adapter that is missing, damaged, or made for another architecture.
    """
    folder = pipeline_folder(model_name_or_path, revision=revision)
    index: Any = DiffusionPipeline.load_config(folder)
    parts = _models(folder, index, dtype)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **parts
        )
    except UNUSABLE as error:
        raise InputError(
            f"{model_name_or_path} cannot be read as a pipeline of safetensors: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        load_adapter(pipeline, adapter)
        set_adapter_scale(pipeline, adapter_scale)
    return pipeline.to(device)


def _models(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The models of a pipeline's folder, each with all of its weights; the safety checker is left out."""
    models = {}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list | tuple) else (None, None)
        module = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
        if module is None or kind is None or name == "safety_checker":
            continue
        model_class = getattr(module, kind, None)
        if isinstance(model_class, type) and issubclass(model_class, nn.Module):
            models[name] = load_complete(
                model_class, folder, f"pipeline's {name}", subfolder=name, dtype=dtype
            )
    return models


def load_generator(generator: Generator, device: str | torch.device = "cpu") -> DiffusionPipeline:
    """The pipeline of a generator, with its adapter at its scale."""
    return load_pipeline(
        generator.model,
        adapter=generator.adapter,
        adapter_scale=generator.adapter_scale,
        revision=generator.revision,
        dtype=getattr(torch, generator.dtype),
        device=device,
    )


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in their order.

    Each image has its own generator, on the CPU so that a seed means the same noise on every device: an image
    can be made again alone, equal up to the kernels' rounding. `height` and `width` in pixels, the model's
    own by default. Raises InputError for prompts that are no text and for images that are not finite.
    """
    arrays = sample_arrays(
        pipeline,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    for array, prompt, seed in zip(arrays, prompts, seeds, strict=True):
        if not np.isfinite(array).all():
            raise InputError(
                f"the model generated values that are not finite for {prompt!r}, seed {seed}: "
                "half precision overflows in some VAEs; try bfloat16 or float32"
            )
        yield to_image(array)


def sample_arrays(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
) -> Iterator[np.ndarray]:
    """The arrays behind the images of `sample`: (height, width, 3) in 0..1, finite or not."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: each image needs one of each")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i} is {type(prompt).__name__}, not text: {prompt!r}")
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[batch]]
        yield from pipeline(  # pyright: ignore[reportCallIssue] (only its base class is not)
            prompt=list(prompts[batch]),
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type="np",
        ).images


def to_image(array: np.ndarray) -> Image.Image:
    """An RGB image of finite values in 0..1."""
    return Image.fromarray((array * 255).round().astype(np.uint8))
