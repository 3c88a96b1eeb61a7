"""The command line of a recipe or builder: one dataclass is its flags, its YAML keys and its help.

`--config file.yaml` gives values, of a file or of a preset with this name; flags win over them, and an
unknown option is an error in either. `--help` shows the program's own options and the training options people
use; `--help-all` shows everything that transformers' Trainer takes. Nothing here imports a model library: a
mistake is answered before any is loaded.
"""

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

# OpenMP reads it when torch is loaded: threads that wait leave their cores to others, but not at once, which
# would take twice as long where there are none.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import psutil
from trl import TrlParser
from yaml import YAMLError

from prefopt.errors import InputError
from prefopt.files import exclusive_lock
from prefopt.options import COMMON_OPTIONS
from prefopt.programs import BAD_INPUT, INTERRUPTED, find_config

Config = TypeVar("Config")


class Parser(TrlParser):
    """trl's parser with a short help, and errors in place of tracebacks."""

    def __init__(self, config_class: Any, **kwargs: Any):
        self.config_class = config_class
        super().__init__(config_class, **kwargs)

    def print_help(self, file=None) -> None:
        """Print the options people use, or with --help-all every option."""
        if "--help-all" not in sys.argv:
            shown = _own_fields(self.config_class) | COMMON_OPTIONS | {"help"}
            for action in self._actions:
                if action.dest not in shown:
                    action.help = argparse.SUPPRESS
        super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, without a usage text of a hundred lines."""
        raise InputError(message)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown words before the config is made, whose checks may load files or ask the hub."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        _refuse_unknown(unknown, list(self._option_string_actions))
        return namespace, unknown

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Convert a file's values as a flag's are converted: by the option's type, checked by its choices."""
        for action in self._actions:
            value = values.get(action.dest)
            if value is None:
                continue
            if action.choices and value not in action.choices:
                raise InputError(
                    f"{action.dest} is {value!r}; choose from {', '.join(map(str, action.choices))}"
                )
            if action.nargs == "+" and not isinstance(value, list):
                values[action.dest] = [value]
            elif isinstance(value, int | float):
                values[action.dest] = str(value)  # argparse converts a default that is text
        unknown = super().set_defaults_with_config(**values)
        _refuse_unknown(unknown, list(self._option_string_actions))
        return unknown


def parse(config_class: type[Config], arguments: list[str] | None = None) -> Config:
    """The config that the command line (`arguments`, or sys.argv) and its `--config` file describe."""
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    usage = "%(prog)s [--config FILE] [--option value ...]"
    parser = Parser(config_class, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--help-all", action="help", help="show every option, the Trainer's own included")
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with values for these options, or a preset by its name"
    )
    try:
        words = _with_one_config(sys.argv[1:] if arguments is None else arguments)
        return parser.parse_args_and_config(words)[0]
    except (ValueError, OSError, TypeError, YAMLError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error)) from error


def run(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Parse the command line and call `main`; bad input ends in one message and exit code 2, Ctrl-C 130.

    The folder `output_dir` is locked meanwhile, by the first of several processes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Of their own calls of what they renamed: nothing that a person running this could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|diffusers|peft|trl)\.")
    # But of an option that was given under its old name.
    warnings.filterwarnings("default", r"`\w+` is deprecated and will be removed", FutureWarning)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        check_launch()
        config: Any = parse(config_class)
        if first and (advice := busy_machine()):
            print(advice, file=sys.stderr)
        with exclusive_lock(Path(config.output_dir)) if first else nullcontext():
            if first:
                print(f"{Path(sys.argv[0]).stem}: {_summary(config)}", file=sys.stderr, flush=True)
            main(config)
    except InputError as error:
        logging.getLogger(__name__).debug("bad input", exc_info=True)
        sys.exit(_say(f"error: {error}", BAD_INPUT))
    except KeyboardInterrupt as interrupt:
        sys.exit(_say(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", INTERRUPTED))


def busy_machine() -> str:
    """What to do about other programs on the same CPU, if there are any and nobody has chosen the threads."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < cores or "OMP_NUM_THREADS" in os.environ:
        return ""
    import torch

    if torch.accelerator.is_available():
        return ""
    return (
        f"other programs use this machine (load {load:.1f} on {cores} cores): with OMP_NUM_THREADS=1 before "
        "the command, no thread waits for another, which may be several times as fast"
    )


def check_launch() -> None:
    """InputError if accelerate was asked for several processes and started one, as it does on CPUs."""
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher and "WORLD_SIZE" not in os.environ else []
    if "launch" not in words or not any("accelerate" in word for word in words[:3]):
        return
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--num_processes", "--num-processes", type=int, default=1)
    asked = options.parse_known_args(words[: words.index(sys.argv[0])] if sys.argv[0] in words else words)[0]
    if asked.num_processes > 1:
        raise InputError(
            f"accelerate was asked for {asked.num_processes} processes and started one: it found no GPUs. "
            f"On CPUs: torchrun --nproc_per_node {asked.num_processes} {sys.argv[0]} ..."
        )


def _refuse_unknown(words: list[str], known: list[str]) -> None:
    """InputError for words of the command line or its file that no option took, with the nearest option."""
    for word in words:
        name = word.partition("=")[0]
        if not name.startswith("--"):
            continue
        near = get_close_matches(name, known, n=1)
        raise InputError(
            f"{name} is no option; "
            + (f"did you mean {near[0]}?" if near else "--help shows those there are")
        )
    if words:
        raise InputError(f"{words[0]!r} is no option and belongs to none; an option begins with --")


def _with_one_config(arguments: list[str]) -> list[str]:
    """The arguments with `--config=file` as two words, as trl's parser wants it, a preset as its path."""
    words = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if words.count("--config") > 1 or words[-1:] == ["--config"]:
        raise InputError("--config takes one YAML file")
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = str(find_config("config", words[place], beginning=Path(sys.argv[0]).stem))
    return words


def _summary(config: Any) -> str:
    """The first line of a run: its model and data, and where the results go."""
    names = ("model_name_or_path", "dataset_name", "classes", "prompts")
    values = [getattr(config, name, None) for name in names]
    parts = [" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values if v]
    return f"{', '.join(parts)} -> {config.output_dir}"


def _say(message: str, code: int) -> int:
    if progress := sys.modules.get("prefopt.progress"):  # which imports torch
        progress.close_bars()
    print(message, file=sys.stderr, flush=True)
    return code


def _own_fields(config_class: type) -> set[str]:
    """The options that a program declares beside transformers' own."""
    base = next((c for c in config_class.__mro__ if c.__name__ == "TrainingArguments"), None)
    inherited = {field.name for field in dataclasses.fields(base)} if base else set()
    return {field.name for field in dataclasses.fields(config_class)} - inherited
