"""The command line of a recipe or builder: one dataclass is its flags, its YAML keys and its help.

`--config file.yaml` gives values, of a file or of a preset with this name; flags win over them, and an
unknown option is an error in either. `--help` shows the program's own options and the training options people
use; `--help-all` shows everything that transformers' Trainer takes. Nothing here imports a model library: a
mistake is answered before any is loaded.
"""

import argparse
import dataclasses
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

# OpenMP reads it when torch is loaded: threads that wait leave their cores to others, but not at once, which
# would take twice as long where there are none.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import psutil
from transformers import HfArgumentParser

from prefopt.errors import InputError
from prefopt.files import exclusive_lock
from prefopt.interrupts import UNREAD, Interrupted, has_lost_a_process, interrupt, is_unread, on_signal
from prefopt.options import COMMON_OPTIONS, option_types, shown
from prefopt.programs import BAD_INPUT, FAILED, INTERRUPTED, find_config
from prefopt.yaml_files import read_yaml

Config = TypeVar("Config")
LOST_MESSAGE = "another process of this run has ended, or cannot be reached; see its own message."


class Parser(HfArgumentParser):
    """transformers' parser with a short help, errors in place of tracebacks, and values of a YAML file."""

    def __init__(self, config_class: Any, **kwargs: Any):
        self.config_class = config_class
        super().__init__(config_class, **kwargs)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: dataclasses.Field) -> None:
        """Add an option; its range and its needs are not argparse's, but checked where the config is made."""
        plain: Any = copy(field)
        plain.metadata = {k: v for k, v in field.metadata.items() if k not in ("within", "needs")}
        HfArgumentParser._parse_dataclass_field(parser, plain)

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
        raise InputError(message if len(message) < 700 else f"{message[:600]} ... {message[-50:]}")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown words before the config is made, whose checks may load files or ask the hub."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        _refuse_unknown(unknown, list(self._option_string_actions))
        return namespace, unknown

    def config(self, words: list[str], file: str | None) -> Any:
        """The config that the words of a command line describe, over the values of a YAML file."""
        if file is not None:
            self.set_defaults(**self.values_of(file))
        given = vars(self.parse_known_args(words)[0])
        names = [field.name for field in dataclasses.fields(self.config_class) if field.init]
        return self.config_class(**{name: given[name] for name in names})

    def values_of(self, file: str) -> dict[str, Any]:
        """The values of a YAML file by option, each of a type that its option takes."""
        entries = read_yaml(file)
        if not isinstance(entries, dict):
            found = "is empty" if entries is None else f"is a {type(entries).__name__}, no mapping"
            raise InputError(f"{file} {found}; write options into it, each on a line, as max_steps: 100")
        hints = get_type_hints(self.config_class)
        actions = {action.dest: action for action in self._actions if action.dest in hints}
        for name in entries:
            if name not in actions:
                raise InputError(f"{file}: {shown(name)} is no option; {_nearest(str(name), list(actions))}")
        return {
            name: _value_of_file(value, f"{file}: {name}", actions[name], hints[name])
            for name, value in entries.items()
        }


def _value_of_file(value: Any, where: str, action: argparse.Action, hint: Any) -> Any:
    """A value of a YAML file as its option takes it; InputError for a value of another type."""
    kinds = {
        get_origin(part) or part
        for part in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])
    }
    if value is None and type(None) not in kinds:
        raise InputError(f"{where} has no value; give it one, or leave the line out")
    if value is None or (isinstance(value, dict) and dict in kinds):
        return value
    if isinstance(value, dict) or (isinstance(value, list) and list not in kinds):
        found = "a list" if isinstance(value, list) else "a mapping"
        raise InputError(f"{where} is {found}; it is a single value")
    if isinstance(value, list):
        return [_single(one, where, action, option_types(hint)) for one in value]
    single = _single(value, where, action, option_types(hint))
    return [single] if action.nargs == "+" else single


def _single(value: Any, where: str, action: argparse.Action, types: set[Any]) -> Any:
    """A single value of a YAML file, by the type and choices of its option as a flag's."""
    numeric = bool(types & {int, float})
    if value is None or isinstance(value, list | dict):
        raise InputError(f"{where} holds {shown(value)}; it is a list of single values")
    if isinstance(value, bool) and bool not in types:
        raise InputError(
            f"{where} is {str(value).lower()}; it is {'a number' if numeric else 'text, in quotes'}"
        )
    if bool in types and not isinstance(value, bool):
        value = str(value)  # yes, 1, ... as a flag's
    if isinstance(value, int | float) and not isinstance(value, bool) and not numeric:
        raise InputError(f"{where} is the number {value}; if text is meant, write it in quotes: '{value}'")
    if isinstance(value, str) and callable(action.type):
        try:
            value = action.type(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{where} is {shown(value)}: {str(error)[:300]}") from error
    if action.choices and value not in action.choices:
        raise InputError(f"{where} is {shown(value)}; choose from {', '.join(map(str, action.choices))}")
    return value


def parse(config_class: type[Config], arguments: list[str] | None = None) -> Config:
    """The config that the command line (`arguments`, or sys.argv) and its `--config` file describe."""
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    usage = "%(prog)s [--config FILE] [--option value ...]"
    parser = Parser(config_class, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--help-all", action="help", help="show every option, the Trainer's own included")
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with values for these options, or a preset by its name"
    )
    return parser.config(*_without_config(sys.argv[1:] if arguments is None else arguments))


def run(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Parse the command line and call `main`; bad input ends in one message and exit code 2.

    Ctrl-C ends it with 130, SIGTERM with 143. The folder `output_dir` is locked meanwhile, by the first of
    several processes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Of their own calls of what they renamed: nothing that a person running this could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|diffusers|peft|trl)\.")
    # But of an option that was given under its old name.
    warnings.filterwarnings("default", r"`\w+` is deprecated and will be removed", FutureWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    with on_signal(interrupt):
        try:
            check_launch()
            _run(main, parse(config_class))
        except InputError as error:
            logging.getLogger(__name__).debug("bad input", exc_info=True)
            sys.exit(_say(f"error: {error}", BAD_INPUT))
        except BrokenPipeError:
            if not is_unread():
                raise
            sys.exit(_say(UNREAD, FAILED))
        except KeyboardInterrupt as end:
            code = end.code if isinstance(end, Interrupted) else INTERRUPTED
            kept = f"what is finished is kept, and the same command {_resuming(config_class)}goes on"
            sys.exit(_say(f"interrupted: {str(end) or kept}", code))


def _run(main: Callable[[Any], object], config: Any) -> None:
    first = int(os.environ.get("RANK", "0")) == 0
    if first and (advice := busy_machine()):
        print(advice, file=sys.stderr)
    with exclusive_lock(Path(config.output_dir)) if first else nullcontext():
        if first:
            print(f"{Path(sys.argv[0]).stem}: {_summary(config)}", file=sys.stderr, flush=True)
        try:
            main(config)
        except RuntimeError as error:
            if not has_lost_a_process(error):
                raise
            message = f"error: {LOST_MESSAGE} The same command {_resuming(config)}goes on."
            sys.exit(_say(message, FAILED))


def _resuming(config: Any) -> str:
    """What has to be added to a training's command."""
    return "with --resume_from_checkpoint " if hasattr(config, "resume_from_checkpoint") else ""


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
    """InputError for words of the command line that no option took, with the nearest option."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--"):
            raise InputError(f"{name[:200]} is no option; {_nearest(name, known)}")
    if words:
        raise InputError(f"{shown(words[0])} is no option and belongs to none; an option begins with --")


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "--help shows those there are"


def _without_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--config`, and the file that it names, a preset's if it is the name of one."""
    words = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if words.count("--config") > 1 or words[-1:] == ["--config"]:
        raise InputError("--config takes one YAML file")
    if "--config" not in words:
        return words, None
    place = words.index("--config")
    file = find_config("config", words[place + 1], beginning=Path(sys.argv[0]).stem)
    return words[:place] + words[place + 2 :], str(file)


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
