"""Recipes and builders by name: `prefopt diffusion_dpo --help`, or `python -m prefopt diffusion_dpo --help`.

On several GPUs: `accelerate launch -m prefopt diffusion_dpo`, with the program's options behind its name.
"""

import runpy
import sys
from importlib.metadata import version

from prefopt.errors import InputError
from prefopt.interrupts import is_unread
from prefopt.programs import BAD_INPUT, BUILDERS, PRESETS, RECIPES, find_program, programs, summary


def main() -> None:
    """Run the program that the command line names, with its options; without a name, list all programs."""
    words = sys.argv[1:] or ["--help"]
    if words[0] == "--version":
        print(f"prefopt {version('prefopt')}")
        return
    if words[0] in ("-h", "--help"):
        try:
            print(listing(), flush=True)
        except BrokenPipeError:  # `| head` has read what it wanted
            is_unread()
        return
    try:
        program = find_program(words[0])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.argv = [str(program), *words[1:]]
    runpy.run_path(str(program), run_name="__main__")


def listing() -> str:
    """Every recipe and builder with a line about it, and how to run one."""
    lines = ["usage: prefopt PROGRAM [--option value ...]", "       prefopt PROGRAM --help"]
    lines += ["       accelerate launch -m prefopt PROGRAM [--option value ...]"]
    for title, folder in (("recipes", RECIPES), ("builders of data", BUILDERS)):
        found = programs(folder)
        width = max(map(len, found))
        lines += ["", f"{title}:"]
        lines += [f"  {name:{width}}  {summary(path)}" for name, path in found.items()]
    presets = ", ".join(sorted(path.name for path in PRESETS.glob("*.yaml")))
    return "\n".join([*lines, "", f"presets, for --config: {presets}"])


if __name__ == "__main__":
    main()
