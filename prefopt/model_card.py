"""README.md beside trained weights: what they are, how they were trained, on what, and how it went."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from prefopt.adapters import ADAPTER_FILE as PEFT_FILE
from prefopt.config import PreferenceConfig
from prefopt.files import public_name, write_atomically
from prefopt.hub import ADAPTER_FILE
from prefopt.options import COMMON_OPTIONS
from prefopt.runs import VALIDATION_STRIPS, read_metrics, versions

# Where a run was and what surrounded it: of no use to others, or told elsewhere in the card.
_PRIVATE = {"output_dir", "cache_dir", "resume_from_checkpoint", "model_name_or_path", "dataset_name"}
_PRIVATE |= {"push_to_hub", "report_to", "validation_prompts"}
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "error/chosen", "error/rejected", "nll/chosen")

CARD = """---
{header}---

# {title}

Trained with prefopt from {model} on {data}: {arithmetic}.

{about}{use}
## Options

Those that matter; config.json has all of them.

| option | value |
|---|---|
{options}

## How it went

| | last logged, step {step} |
|---|---|
{figures}
{images}
## Versions

{versions}
"""


# By the file of an adapter: its library, and how it is loaded.
_ADAPTERS = {
    ADAPTER_FILE: ("diffusers", 'pipeline.load_lora_weights("{title}")'),
    PEFT_FILE: ("peft", 'model = PeftModel.from_pretrained(model, "{title}")'),
}


def write_card(
    folder: Path, run: Path, config: PreferenceConfig, *, arithmetic: str, about: Mapping[str, str]
) -> None:
    """Write README.md to `folder`, for the weights there that `run` trained."""
    model, data = (
        public_name(getattr(config, name, None) or "") for name in ("model_name_or_path", "dataset_name")
    )
    header = {"tags": ["prefopt", *(["lora"] if getattr(config, "use_peft", False) else [])]}
    header |= {"base_model": model} if model and "/" in model else {}
    header |= {"datasets": [data]} if data and "/" in data else {}
    library, load = next((_ADAPTERS[file] for file in _ADAPTERS if (folder / file).is_file()), ("", ""))
    header |= {"library_name": library} if library else {}
    use = f"\n    {load.format(title=run.name)}\n" if load else ""
    if start := getattr(config, "adapter_name_or_path", None):
        use += f"\nIt holds what the adapter {public_name(start)} had learned: load it alone.\n"
    rows = read_metrics(run)
    last = next((row for row in reversed(rows) if "loss" in row), {})
    figures = [(name, last[name]) for name in _SHOWN if name in last]
    held_out = next((row for row in reversed(rows) if "eval_loss" in row), {})
    figures += [(name, held_out[name]) for name in (f"eval_{shown}" for shown in _SHOWN) if name in held_out]
    has_images = (run / VALIDATION_STRIPS).is_file() and folder == run
    card = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=run.name,
        model=model or "a model in memory",
        data=data or "a dataset in memory",
        arithmetic=arithmetic,
        use=use,
        about="".join(f"{name}: {fact}.\n" for name, fact in about.items()),
        options="\n".join(f"| `{name}` | {value} |" for name, value in _changed(config).items()),
        step=last.get("step", 0),
        figures="\n".join(f"| {name} | {value:.4g} |" for name, value in figures),
        images=f"\n![images of the same prompts and seeds over the steps]({VALIDATION_STRIPS})\n"
        if has_images
        else "",
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
    write_atomically(folder / "README.md", card)


def _changed(config: PreferenceConfig) -> dict[str, Any]:
    """The options of a recipe that differ from their defaults, without those that say where things are."""
    trainers_own = {field.name for field in fields(TrainingArguments)} - COMMON_OPTIONS
    changed = {}
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name in trainers_own | _PRIVATE or value is None or value == (default or False):
            continue
        changed[field.name] = public_name(value) if isinstance(value, str) else value
    return changed
