"""Recipes that are several commands, one after the other: each is printed, and none is run twice."""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.files import write_atomically

NONE = "none"


def fill_presets(
    config: object, presets: Mapping[str, Path], model: str, *, may_be_none: Sequence[str] = ()
) -> None:
    """Set the options that name a YAML file for each step; the model `pocket` has presets for them.

    InputError for a file that is not there. For `may_be_none` the word none says that there is no such step.
    """
    pocket.fill_defaults(config, [model], *presets)
    for name, preset in presets.items():
        file = getattr(config, name)
        if file == NONE and name in may_be_none:
            continue
        if file == pocket.NAME:
            setattr(config, name, file := str(preset))
        if not Path(file).is_file():
            raise InputError(f"--{name}: no file {file}; name a YAML file of its options")


def run_step(name: str, command: Sequence[str], folder: Path, processes: int) -> None:
    """Run a script with its options, on so many processes, unless it has already ended well with the same.

    A script that fails is an InputError: its own message is above.
    """
    words = [*launcher(processes), *command]
    config = command[command.index("--config") + 1]
    key = hashlib.sha256(json.dumps([words, Path(config).read_text()]).encode()).hexdigest()
    record = folder / f"{name}.done"
    if record.is_file() and record.read_text() == key:
        print(f"{folder}: {name} is done", flush=True)
        return
    print(f"\n{shlex.join(words)}", flush=True)
    if code := subprocess.run(words, check=False).returncode:
        raise InputError(
            f"the step {name} ended with exit code {code}, its message is above; mend it and run this again"
        )
    write_atomically(record, key)


def launcher(processes: int) -> list[str]:
    """accelerate's launcher, of the Python that runs this, with its own config file if there is one."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--num_processes", str(processes)]
    from accelerate.commands.config.config_args import default_config_file

    if not Path(default_config_file).is_file():  # its defaults, or it warns of each
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return launch
