"""Images from any text-to-image pipeline, each a function of its own prompt and seed.

Left out: the safety checker. It replaces an image by black without a word, and a black image would be scored
as if the model had drawn it. It is never loaded here; put one back around whatever serves images to people.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open

from prefopt import pocket
from prefopt.records import InputError
from prefopt.store import content_key

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "sampled"  # the name under which a pipeline holds the adapter
MODEL_FILE = "model_index.json"

# One of these is in the name of each pair's first factor.
_LORA_DOWN = ("lora_A.", "lora_down.", "lora.down.", "lora_linear_layer.down.")

_WEIGHT_FILES = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True)
class System:
    """One column of the comparison: a model, and a LoRA adapter at a scale if one is named."""

    name: str
    model: str
    adapter: str | None = None
    scale: float = 1.0
    revision: str | None = None


@dataclass(frozen=True)
class Sampler:
    """What decides an image beside model, prompt and seed; sizes in pixels, None: the model's own."""

    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None


def load_pipeline(
    model_name_or_path: str,
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
    options = {}
    if "safety_checker" in DiffusionPipeline.load_config(folder):
        options = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{model_name_or_path} cannot be read as a pipeline of safetensors: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        load_adapter(pipeline, adapter)
        set_adapter_scale(pipeline, adapter_scale)
    return pipeline.to(device)


def pipeline_folder(model_name_or_path: str, *, revision: str | None = None) -> Path:
    """The local folder of a pipeline: the folder named, the pocket's, or the download of a hub id."""
    name = pocket.resolve(str(model_name_or_path), "text_to_image")
    if Path(name).is_dir():
        if not (Path(name) / MODEL_FILE).is_file():
            raise InputError(f"{name} is no pipeline: it holds no {MODEL_FILE}")
        return Path(name)
    if Path(name).is_absolute() or name.count("/") != 1:
        raise InputError(
            f"no model folder {name}; give a folder that holds {MODEL_FILE}, a hub id, or pocket"
        )
    try:
        return Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} is no folder here, and as a hub id it cannot be fetched: {error}"
        ) from error


def adapter_file(adapter: str | Path) -> Path:
    """The safetensors file of an adapter that is named by its folder or by the file itself."""
    path = Path(adapter)
    if not path.exists():
        raise InputError(f"no adapter {path}: it is neither a folder nor a file")
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.is_file():
        raise InputError(f"no adapter in {path.parent}: it holds no {ADAPTER_FILE}")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not safetensors; only safetensors adapters are read")
    return path


def set_adapter_scale(pipeline: DiffusionPipeline, scale: float) -> None:
    """Weigh the loaded adapter; at 0 its layers are switched off, so that the base answers bit for bit."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters([ADAPTER], adapter_weights=[scale])


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
    drawn = sample_arrays(
        pipeline,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    for array, prompt, seed in zip(drawn, prompts, seeds, strict=True):
        if not np.isfinite(array).all():
            raise InputError(
                f"the model drew values that are not finite for {prompt!r}, seed {seed}: "
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
    """What `sample` draws, as the model drew it: (height, width, 3) in 0..1, finite or not."""
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


def load_adapter(pipeline: DiffusionPipeline, adapter: str | Path, name: str = ADAPTER) -> None:
    """Load a LoRA folder or file; InputError unless every pair of its factors finds its layer."""
    file, model = adapter_file(adapter), pipeline.name_or_path
    # diffusers warns for each component that an adapter leaves alone, and prints what it then raises: what
    # matters is counted or raised below.
    log = logging.getLogger("diffusers.loaders")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with safe_open(file, framework="pt") as tensors:
            expected = sum(any(part in key for part in _LORA_DOWN) for key in tensors.keys())  # noqa: SIM118
        pipeline.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
        )
    except (RuntimeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise InputError(f"the adapter {file} does not fit the model {model}: {reason}") from error
    finally:
        log.setLevel(level)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    found = sum(f"lora_A.{name}." in key for module in modules for key, _ in module.named_parameters())
    if expected == 0 or found < expected:
        raise InputError(
            f"the adapter {file} does not fit the model {model}: of its {expected} pairs of LoRA factors, "
            f"the model has layers for {found}"
        )


def system_identity(system: System) -> dict[str, str | float | None]:
    """Who draws: SHA-256 of the model's files and of the adapter's, and the scale; at 0 the model itself."""
    folder = pipeline_folder(system.model, revision=system.revision)
    components = [part for part in json.loads((folder / MODEL_FILE).read_text()) if (folder / part).is_dir()]
    files = [
        path
        for part in components
        for path in sorted((folder / part).rglob("*"))
        if path.suffix in _WEIGHT_FILES
    ]
    lines = [f"{path.relative_to(folder)} {_file_key(path)}" for path in [folder / MODEL_FILE, *files]]
    adapter = _file_key(adapter_file(system.adapter)) if system.adapter is not None else None
    weighs = adapter is not None and system.scale != 0
    return {
        "model": content_key("\n".join(lines)),
        "adapter": adapter if weighs else None,
        "scale": system.scale if weighs else None,
    }


def _file_key(path: Path) -> str:
    stat = path.stat()
    return _read_file_key(path, stat.st_size, stat.st_mtime_ns)


@cache
def _read_file_key(path: Path, size: int, modified: int) -> str:
    """The SHA-256 of a file; one model in five systems is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
