"""The training runs that a comparison's report shows: their settings and what they logged."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.errors import InputError
from prefopt.runs import METRICS_FILE, read_metrics

CONFIG_FILE = "config.json"
_CHECKPOINT = "checkpoint-"  # how the name of a folder of weights inside a run begins
_SETTINGS = {  # what a reader looks for first: the title of a row, and the options that it shows
    "dataset": ("dataset_name", "dataset_config"),
    "model": ("model_name_or_path", "model_revision"),
    "starts from the adapter": ("adapter_name_or_path",),
    "loss": ("loss_type",),
    "list loss": ("list_loss",),
    "beta_dpo": ("beta_dpo",),
    "beta": ("beta",),
    "learning rate": ("learning_rate", "lr_scheduler_type"),
    "warmup steps": ("warmup_steps",),
    "discriminator in the loss": ("discriminator_name_or_path",),
    "seed": ("seed",),
}


class TrainingRun(NamedTuple):
    """A run's folder, read."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl
    config: dict[str, Any]  # config.json; empty if there is none

    @property
    def has_losses(self) -> bool:
        """Whether it logged a loss: one that is shorter than its --logging_steps did not."""
        return any("loss" in line for line in self.lines)

    @property
    def settings(self) -> dict[str, str]:
        """The most important options, in words."""
        if not self.config:
            return {}
        options = self.config["options"]
        found = {
            title: ", ".join(str(options[name]) for name in names if options.get(name) is not None)
            for title, names in _SETTINGS.items()
        }
        if options.get("use_peft"):
            start = options.get("adapter_name_or_path")  # whose rank is not among the options
            sizes = {"rank": options.get("lora_r"), "alpha": options.get("lora_alpha")}
            given = [f"{title} {size}" for title, size in sizes.items() if size is not None]
            found["LoRA"] = ", ".join([*([f"from {Path(start).name}"] if start else []), *given])
        found["examples and steps"] = self.config.get("arithmetic", "")
        found |= {name: str(fact) for name, fact in self.config.get("about", {}).items()}
        return {title: text for title, text in found.items() if text}


def training_runs(systems: Mapping[str, str], folders: Iterable[str | Path] = ()) -> list[TrainingRun]:
    """The runs that trained some systems, from the folders of their weights by name, and those of `folders`.

    A system's folder that is no run's is skipped; one of `folders` that is none is an InputError.
    """
    found: dict[Path, TrainingRun] = {}
    for name, path in systems.items():
        folder = Path(path)
        run = folder.parent if folder.is_file() or folder.name.startswith(_CHECKPOINT) else folder
        if folder.exists() and (config := _config(run)):
            found.setdefault(run.resolve(), TrainingRun(name, run, read_metrics(run), config))
    for path in map(Path, folders):
        if not (path / METRICS_FILE).is_file():
            raise InputError(f"{path} is no training run: it holds no {METRICS_FILE}")
        name = path.name if all(path.name != run.name for run in found.values()) else str(path)
        found.setdefault(path.resolve(), TrainingRun(name, path, read_metrics(path), _config(path)))
    return list(found.values())


def settings_table(runs: Sequence[TrainingRun]) -> dict[str, list[str]]:
    """A row of each setting, a cell of each run; empty where a run has no such setting."""
    settings = [run.settings for run in runs]
    titles = dict.fromkeys(title for of_one in settings for title in of_one)
    return {title: [of_one.get(title, "") for of_one in settings] for title in titles}


def _config(run: Path) -> dict[str, Any]:
    """A run's config.json; {} if there is none, or if it is a model's."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; restore it, or delete it") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no options by their names; restore it, or delete it")
    return config if isinstance(config.get("options"), dict) else {}
