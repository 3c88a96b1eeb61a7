"""Recipes run in this process, and what a run logged."""

import json
from pathlib import Path
from typing import Any

from prefopt.programs import config_of, find_program, load


def recipe(name: str) -> Any:
    """A recipe as a module."""
    return load(find_program(name))


def train(setting: dict, folder: Path, name: str = "diffusion_dpo", **options: Any) -> Any:
    """Run a recipe's main in this process; its trainer."""
    config = config_of(find_program(name))
    return recipe(name).main(config(**{**setting, "output_dir": str(folder), **options}))


def logged(folder: Path, name: str = "loss") -> list[float]:
    """A metric of a run's steps, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]
