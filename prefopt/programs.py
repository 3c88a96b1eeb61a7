"""The recipes, the builders and the presets: where they lie, and what they are called.

A checkout has the recipes in recipes/, an installed wheel has them in prefopt_recipes/ beside this package;
the builders lie in data_builders/ in both.
"""

import ast
import importlib.util
import os
import sys
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from prefopt.errors import InputError

# Exit codes besides 0: a fault of the program, or another process of its run is gone; bad input;
# ended by SIGINT (Ctrl-C); by SIGTERM.
FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ROOT / "prefopt_recipes"
RECIPES = INSTALLED if INSTALLED.is_dir() else ROOT / "recipes"
BUILDERS = ROOT / "data_builders"
PRESETS = RECIPES / "configs"


def programs(folder: Path) -> dict[str, Path]:
    """The programs of `RECIPES` or `BUILDERS` by name, in alphabetical order."""
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def summary(program: Path) -> str:
    """The first line of a program's docstring."""
    return (ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def config_of(program: Path) -> type:
    """The dataclass of a program's options, which it hands to `run`."""
    nodes = ast.walk(ast.parse(program.read_text(encoding="utf-8")))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    name = next(ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "run")
    return getattr(load(program), name)


@cache
def load(program: Path) -> Any:
    """A program as a module; nothing imports them otherwise."""
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[program.stem] = module  # where dataclasses looks for the names of annotations
    spec.loader.exec_module(module)
    return module


def find_program(name: str) -> Path:
    """The file of a recipe or builder; InputError with the nearest name for any other."""
    known = programs(RECIPES) | programs(BUILDERS)
    if name not in known:
        raise InputError(
            f"there is no recipe or builder {name!r}; {_nearest(name, list(known))}`prefopt --help` lists all"
        )
    return known[name]


def find_config(option: str, name_or_path: str, beginning: str = "") -> Path:
    """The YAML file that `--option` names: a path or, where there is no such file, a preset by its name.

    A preset's name may be given without `.yaml`. InputError for what is neither, with the nearest preset and
    those whose names have this `beginning`.
    """
    path = Path(name_or_path)
    if os.path.exists(path) and not path.is_dir():
        return path
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    name, shown = name_or_path.removesuffix(".yaml"), name_or_path[:200]
    if name in presets:
        return presets[name]
    if path.name != name_or_path:
        raise InputError(f"--{option}: no file {shown}; name a YAML file of options")
    own = [preset for preset in presets if beginning and preset.startswith(beginning)]
    raise InputError(
        f"--{option}: no file {shown}, and no preset of this name; "
        f"{_nearest(name, list(presets))}presets: {', '.join(own or presets)}"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = [one for one in known if name in one] or get_close_matches(name, known, n=1)
    return f"did you mean {' or '.join(near)}? " if 0 < len(near) <= 4 else ""
