"""How the pocket's parts are written: float16 safetensors that load as float32, and PROVENANCE.json."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
import transformers

from prefopt import pocket

PROVENANCE = Path(pocket.__file__).with_name("PROVENANCE.json")


def save_half(model: Any, path: Path) -> None:
    """`save_pretrained` in float16 with a config that says float32.

    The config's dtype is what transformers loads a model as when nobody names one, and half precision is slow
    or missing on CPUs.
    """
    model.half().save_pretrained(path)
    model.float()
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a place on the machine that trained it
    _say_float32(config)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _say_float32(config: dict) -> None:
    if "dtype" in config:
        config["dtype"] = "float32"
    for value in config.values():
        if isinstance(value, dict):
            _say_float32(value)


def save_pipeline(pipeline: diffusers.StableDiffusionPipeline, path: Path) -> None:
    """The pipeline's folder, each part of it as `save_half` writes it."""
    pipeline.save_config(path)
    pipeline.scheduler.save_pretrained(path / "scheduler")
    pipeline.tokenizer.save_pretrained(path / "tokenizer")
    for name in ("vae", "unet", "text_encoder"):
        save_half(getattr(pipeline, name), path / name)


def record(part: str, folder: Path, *, command: str, seed: int, quality: dict, **facts: Any) -> None:
    """Put a part's entry into PROVENANCE.json: how it was made, how large it is, what was measured."""
    entries = json.loads(PROVENANCE.read_text(encoding="utf-8")) if PROVENANCE.exists() else {}
    entries[part] = {
        "command": command,
        "seed": seed,
        **facts,
        "bytes": {
            str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()
        },
        "quality": _rounded(quality),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers, PIL)},
        },
    }
    PROVENANCE.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(float(value), 4) if isinstance(value, float) else value
