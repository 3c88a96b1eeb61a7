"""Recipes that are several commands, one after the other: each is printed, and none is done twice."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from prefopt import pocket
from prefopt.cli import Parser
from prefopt.errors import InputError
from prefopt.files import content_key, write_atomically
from prefopt.interrupts import Interrupted
from prefopt.options import check_values
from prefopt.programs import config_of, find_config
from prefopt.yaml_files import read_yaml

NONE = "none"


def fill_presets(
    config: object, presets: Mapping[str, Path], model: str, *, may_be_none: Sequence[str] = ()
) -> None:
    """Set the options that name a YAML file for each step; the model `pocket` has presets for them.

    Other presets are found by their names, as by --config. InputError for a file that is not there. For
    `may_be_none` the word none says that there is no such step.
    """
    pocket.fill_defaults(config, [model], *presets)
    for name, preset in presets.items():
        file = getattr(config, name)
        if file == NONE and name in may_be_none:
            continue
        beginning = preset.stem.removesuffix(f"_{pocket.NAME}")
        file = str(preset if file == pocket.NAME else find_config(name, file, beginning))
        setattr(config, name, file)
        try:
            entries = read_yaml(file)
        except InputError as error:
            raise InputError(f"--{name}: {file} is no YAML file of options: {error}") from error
        if not isinstance(entries, dict):
            raise InputError(f"--{name}: {file} is no YAML file of options, each a name with a value")


def run_steps(steps: Mapping[str, Sequence[str]], folder: Path, processes: int) -> None:
    """Run scripts with their options, by name, each on so many processes.

    The options in their files are checked before the first one runs. A step that ended well with the same
    options, after the same steps, is not run again. A training's folder
    that has checkpoints of other options is an InputError: it would go on from them. So is a script that
    fails; its own message is above.
    """
    for command in steps.values():
        _check_file(command)
    keys: list[str] = []  # a step depends on all before it
    for name, command in steps.items():
        words = [*launcher(processes), *command]
        options = Path(command[command.index("--config") + 1]).read_text()
        keys.append(content_key(json.dumps([processes, *command, options, *keys])))
        done, begun = folder / f"{name}.done", folder / f"{name}.begun"
        if _read(done) == keys[-1]:
            print(f"{folder}: {name} is done", flush=True)
            continue
        if any((folder / name).glob("checkpoint-*")) and _read(begun) != keys[-1]:
            raise InputError(
                f"{folder / name} has checkpoints of other options or data than the step {name} has now; "
                "delete that folder, or name another --output_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, keys[-1])
        print(f"\n{shlex.join(words)}", flush=True)
        if code := _run(words):
            raise InputError(
                f"the step {name} ended with exit code {code}, its message is above; mend it and run this "
                "again"
            )
        write_atomically(done, keys[-1])


def _check_file(command: Sequence[str]) -> None:
    """InputError for a script's file of options with an unknown one, or a value that it cannot have."""
    file = command[command.index("--config") + 1]
    config_class = config_of(Path(command[0]))
    values = Parser(config_class).values_of(file)
    try:
        check_values(config_class, values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _run(words: Sequence[str]) -> int:
    """Run a launcher with its command, to the end even if a signal comes; its exit code."""
    launched = subprocess.Popen(words)
    try:
        return launched.wait()
    except Interrupted as end:
        if end.number == signal.SIGTERM:  # a Ctrl-C comes to all of them by itself
            itself = psutil.Process(launched.pid)
            for process in itself.children() or [itself]:  # accelerate's launcher hands nothing on
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        launched.wait()
        raise


def _read(record: Path) -> str:
    return record.read_text() if record.is_file() else ""


def launcher(processes: int) -> list[str]:
    """accelerate's launcher, of the Python that runs this, with its own config file if there is one."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--quiet", "--num_processes", str(processes)]  # no traceback of its own if a step fails
    from accelerate.commands.config.config_args import default_config_file

    if not Path(default_config_file).is_file():  # its defaults, or it warns of each
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return launch
