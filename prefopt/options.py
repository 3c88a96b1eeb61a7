"""The fields of a config, and the checks that several configs share; importing this imports nothing heavy."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

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

# Of transformers' options, the range of each number.
TRAINER_RANGES = {
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, 1]",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": "[1, 1024]",
    "data_seed": "[0, 4294967295]",
    "ddp_bucket_cap_mb": "[1, 65536]",
    "ddp_timeout": "[1, 1e9]",
    "eval_accumulation_steps": "[1, 1e9]",
    "eval_delay": "[0, 1e9]",
    "eval_steps": "(0, 1e9]",
    "gradient_accumulation_steps": "[1, 65536]",
    "label_smoothing_factor": "[0, 1)",
    "learning_rate": "(0, inf)",
    "local_rank": "[0, 65536]",
    "logging_steps": "(0, 1e9]",
    "max_grad_norm": "[0, inf)",
    "max_steps": "[1, 1e9]",
    "neftune_noise_alpha": "[0, inf)",
    "num_train_epochs": "(0, 1e6]",
    "per_device_eval_batch_size": "[1, 65536]",
    "per_device_train_batch_size": "[1, 65536]",
    "save_steps": "(0, 1e9]",
    "save_total_limit": "[1, inf)",
    "seed": "[0, 4294967295]",
    "torch_empty_cache_steps": "[1, inf)",
    "warmup_steps": "[0, 1e9]",
    "weight_decay": "[0, 100]",
}
# Options that name a folder that is made if it is not there.
FOLDERS = ("output_dir", "cache_dir")
LONGEST, LONGEST_PART = 4096, 255  # of a text, and of a part of a path: what Linux allows of a path, in bytes
LARGEST = 10**15  # of whole numbers, which are then exact as floats, too


def option(
    default: Any, help: str, within: str | None = None, needs: str | None = None, **parser: Any
) -> Any:
    """A field of a config: its default, its help on the command line, and when it can have another value.

    `within` is the interval of its numbers, such as `[0, 1)` or `[2, inf)`; `needs` names the options without
    which it has no effect, as `adapter or sources`, or `regulariser=r1`; `parser` is argparse's.
    """
    metadata = {"help": help, "within": within, "needs": needs, **parser}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def range_of(option: Field) -> str | None:
    """The interval in which an option's numbers lie."""
    return option.metadata.get("within") or TRAINER_RANGES.get(option.name)


def default_of(option: Field) -> Any:
    """The value of an option that is not given."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def shown(value: object) -> str:
    """A value as a message shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:70]} ... {text[-20:]}"


def check_options(config: object) -> None:
    """InputError unless each option of a dataclass has a value that it can have.

    A number has its option's type and lies in its range, and none is nan; a text is not empty; a word is one
    of those to choose from; a folder can be made.
    """
    given = {each.name: getattr(config, each.name) for each in fields(config)}  # pyright: ignore[reportArgumentType]
    check_values(type(config), given)
    for each in fields(config):  # pyright: ignore[reportArgumentType]
        value = given[each.name]
        if value is None or value == default_of(each):
            continue
        if needs := each.metadata.get("needs"):
            check_needs(config, each.name, needs)
        if each.name in FOLDERS:
            _check_folder(f"--{each.name}", str(value))


def check_values(config_class: Any, values: Mapping[str, Any]) -> None:
    """InputError unless each of these values is one that the option of its name can have by itself."""
    hints = get_type_hints(config_class)
    for each in fields(config_class):
        value = values.get(each.name)
        if value is None or value == default_of(each):
            continue
        types = option_types(hints[each.name])
        for one in value if isinstance(value, list) else [value]:
            if types & {int, float} and bool not in types:
                check_number(f"--{each.name}", one, range_of(each), whole=float not in types)
            elif isinstance(one, str):
                _check_text(f"--{each.name}", one)
                _check_choice(f"--{each.name}", one, types)


def check_needs(config: object, name: str, needs: str) -> None:
    """InputError for an option that has no effect without one of some others, of which none is given."""
    for other in needs.split(" or "):
        option, _, value = other.partition("=")
        given = getattr(config, option)
        if given == value if value else given:
            return
    wanted = needs.replace("=", " ").replace(" or ", " or --")
    raise InputError(f"--{name} has no effect without --{wanted}; add that, or leave it out")


def check_number(where: str, value: Any, interval: str | None = None, *, whole: bool = False) -> None:
    """InputError unless a value is a number, a whole one where it has to be, and lies in an interval."""
    kind, named = (int, "a whole number") if whole else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{where} is {shown(value)}; it is {named}")
    if abs(value) > LARGEST and isinstance(value, int):
        raise InputError(f"{where} is larger than {LARGEST:.0e}; no number here is that large")
    interval = interval or "(-inf, inf)"
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (isfinite(value) and above and below):
        raise InputError(f"{where} is {value}; it {_words(interval)}")


def _words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if (low, high) == ("-inf", "inf"):
        return "is a finite number"
    if high == "inf":
        return f"is {low} or more" if interval[0] == "[" else f"is above {low}"
    return f"lies in {interval}"


def option_types(hint: Any) -> set[Any]:
    """The types that a hint names, those in a list, too; of a Literal its words."""
    inside = get_args(hint)
    if get_origin(hint) in (Literal, dict) or not inside:
        return {hint}
    return set().union(*map(option_types, inside))


def _check_text(where: str, text: str) -> None:
    if not text.strip():
        raise InputError(f"{where} is empty; give it a value, or leave it out")
    if "\0" in text:
        raise InputError(f"{where} is {shown(text)}; a text has no character NUL")
    if len(text) > LONGEST:
        raise InputError(f"{where} is {shown(text)}, {len(text)} characters; it has {LONGEST} at most")


def _check_choice(where: str, text: str, types: set[Any]) -> None:
    """InputError for a word that is none of a Literal's, or of an enumeration's, if the option is one."""
    literals = [] if str in types else [one for one in types if get_origin(one) is Literal]
    enums = [one for one in types if isinstance(one, type) and issubclass(one, Enum)]
    choices = [w for one in literals for w in get_args(one)] + [w.value for one in enums for w in one]
    if choices and (unknown := [word for word in text.split() if word not in choices]):
        raise InputError(f"{where} is {shown(unknown[0])}; {_choose(unknown[0], choices)}")


def _choose(word: str, choices: Sequence[str]) -> str:
    near = get_close_matches(word, choices, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"choose from {', '.join(choices)}"


def _check_folder(where: str, name: str) -> None:
    """InputError for what is no folder and cannot become one."""
    try:
        there = Path(name).expanduser()
        if there.exists() and not there.is_dir():
            raise InputError(f"{where} {name} is a file; name a folder")
        there.stat()
    except FileNotFoundError:
        return
    except (OSError, RuntimeError) as error:  # a name too long, a file on the way, ~ of nobody
        raise InputError(f"{where} is {shown(name)}: {error}; name another folder") from error


def check_name(name: str | Path, where: str) -> None:
    """InputError for what is the name of no file and of nothing on the hub; `where` it was given."""
    if not str(name).strip() or "\0" in str(name):
        raise InputError(f"{where} is {shown(str(name))}; give a name or a path")
    try:
        parts = [os.fsencode(part) for part in str(name).split("/")]
    except UnicodeError as error:
        raise InputError(f"{where} is {str(name)!r}, which is no text: {error}") from error
    if sum(map(len, parts)) + len(parts) > LONGEST or max(map(len, parts)) > LONGEST_PART:
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
    if revision and (name_or_path == pocket.NAME or os.path.exists(name_or_path)):
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
        or (len(rest) > 0 and os.path.isdir(first))
    )
