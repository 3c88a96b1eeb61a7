"""The fields of a config, and the checks that several configs share; importing this imports nothing heavy."""

import os
import re
from dataclasses import field
from math import isfinite
from pathlib import Path
from typing import Any

from prefopt import pocket
from prefopt.errors import InputError

# Of transformers' options, those that people use.
COMMON_OPTIONS = {
    "bf16",
    "dataloader_num_workers",
    "fp16",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "learning_rate",
    "logging_steps",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "optim",
    "output_dir",
    "per_device_train_batch_size",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "seed",
    "torch_compile",
    "warmup_steps",
}

LONGEST_PATH, LONGEST_PART = 4096, 255  # bytes that Linux allows


def option(default: Any, help: str, **parser: Any) -> Any:
    """A field of a config: its default, and its help on the command line; `parser` is argparse's."""
    metadata = {"help": help, **parser}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_interval(config: object, interval: str, *names: str) -> None:
    """InputError unless these options, where given, lie in an interval such as `[0, 1)` or `[2, inf)`."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (isfinite(value) and above and below):
            allowed = (
                f"is {low:g} or more" if interval[0] + interval[-4:] == "[inf)" else f"lies in {interval}"
            )
            raise InputError(f"--{name} is {value}; it {allowed}")


def check_name(name: str | Path, where: str) -> None:
    """InputError for what is the name of no file and of nothing on the hub; `where` it was given."""
    if not str(name).strip() or "\0" in str(name):
        raise InputError(f"{where} is {str(name)!r}; give a name or a path")
    try:
        parts = [os.fsencode(part) for part in str(name).split("/")]
    except UnicodeError as error:
        raise InputError(f"{where} is {str(name)!r}, which is no text: {error}") from error
    if sum(map(len, parts)) + len(parts) > LONGEST_PATH or max(map(len, parts)) > LONGEST_PART:
        beginning = str(name)[:40]
        raise InputError(f"{where} is too long for a path; it begins with {beginning!r}")


def check_paths_exist(config: object, *names: str) -> None:
    """InputError if one of these options names a local path, not a hub id, and nothing is there.

    If something is there, the option of its revision is an InputError, see `check_revision`.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        check_name(value, f"--{name}")
        if is_local_path(value) and not Path(value).exists():
            raise InputError(f"--{name}: there is no {value}")
        of = re.sub(r"(_model)?_name(_or_path)?$", "", name)  # judge_model_name_or_path: judge_revision
        for option in (f"{of}_revision", *(["revision"] if of == "model" else [])):
            check_revision(
                value, getattr(config, option, None), f"--{option} {getattr(config, option, None)}"
            )


def check_revision(name_or_path: str, revision: str | None, where: str) -> None:
    """InputError for a revision of what is on this machine: only what is on the hub has revisions."""
    if revision and (name_or_path == pocket.NAME or Path(name_or_path).exists()):
        raise InputError(
            f"{where}: {name_or_path} is on this machine and has no revisions, as what is on the hub has; "
            "leave it out"
        )


def is_local_path(name: str) -> bool:
    """Whether a name is a local path for sure: no hub id, and no file of one, `org/name/x.safetensors`.

    One whose first folder is here is a path: a mistyped `runs/dpo` is not what a user `runs` of the hub has.
    """
    first, *rest = name.split("/")
    is_file_of_hub_id = len(rest) == 2 and name.endswith(".safetensors")
    return (
        name.startswith((".", "/", "~"))
        or (len(rest) > 1 and not is_file_of_hub_id)
        or (len(rest) > 0 and Path(first).is_dir())
    )
