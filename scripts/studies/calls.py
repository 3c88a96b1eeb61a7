"""How the studies run builders and recipes: as a person does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def call(script: str, options: dict[str, Any], config: Path | None = None) -> None:
    """Run a script with these options and the presets of `config`; False becomes `--no_NAME`.

    A script that fails ends the study with what it said.
    """
    command = [sys.executable, str(ROOT / script), *(["--config", str(config)] if config else [])]
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        command += [f"--no_{name}"] if value is False else [f"--{name}", *map(str, values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}")
