"""Recipes run in this process, and what a run logged."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from launching import ROOT

CONFIGS = {
    "diffusion_cpo": "DiffusionCPOConfig",
    "diffusion_dpo": "DiffusionDPOConfig",
    "diffusion_sft": "DiffusionSFTConfig",
    "discriminator": "DiscriminatorConfig",
    "vlm_dpo": "VlmDPOConfig",
    "vlm_qlora_ensemble": "VlmEnsembleConfig",
    "vlm_sft": "VlmSFTConfig",
}


@cache
def recipe(name: str) -> Any:
    """A recipe as a module; nothing imports them otherwise."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses looks for the names of annotations
    spec.loader.exec_module(module)
    return module


def train(setting: dict, folder: Path, name: str = "diffusion_dpo", **options: Any) -> Any:
    """Run a recipe's main in this process; its trainer."""
    module = recipe(name)
    config = getattr(module, CONFIGS[name])
    return module.main(config(**{**setting, "output_dir": str(folder), **options}))


def logged(folder: Path, name: str = "loss") -> list[float]:
    """A metric of a run's steps, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]
