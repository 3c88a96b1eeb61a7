"""How the house is built: imports go one way, names stay in their wings, nothing is unsafe, help is quick."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

FOLDERS = ("prefopt", "data_builders", "recipes", "scripts")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PURE = ("losses", "draws", "errors", "files")
ENTRY_POINTS = sorted(
    path for folder in ("recipes", "data_builders") for path in (ROOT / folder).glob("[!_]*.py")
)
TRAINING = (
    "diffusion_cpo",
    "diffusion_dpo",
    "diffusion_sft",
    "discriminator",
    "vlm_dpo",
    "vlm_qlora_ensemble",
    "vlm_sft",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def below(names: set[str], *packages: str) -> set[str]:
    return {name for name in names for package in packages if f"{name}.".startswith(f"{package}.")}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    folder, names = relative(path).split("/")[0], imported(path)
    assert not below(names, "recipes", "tests", "scripts"), "nothing imports a recipe"
    if folder == "prefopt":
        assert not below(names, "data_builders")
    if folder in ("prefopt", "data_builders"):
        assert not below(names, *(recipe.stem for recipe in (ROOT / "recipes").glob("*.py")))


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_import_errors_and_nothing_else_of_ours(name):
    ours = below(imported(ROOT / "prefopt" / f"{name}.py"), "prefopt")
    assert ours <= {"prefopt.errors", "prefopt.errors.InputError"}


@pytest.mark.parametrize("depth", [9, 2], ids=["files", "rooms"])
def test_no_import_goes_in_a_circle(depth):
    """Neither from file to file nor, in prefopt and in data_builders, from room to room."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    modules = {module(path): path for path in FILES if relative(path).startswith(FOLDERS[:2])}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        needs = {room(other) for other in imported(path) & (modules.keys() - set(FOLDERS))}
        graph.setdefault(room(name), set()).update(needs - {room(name)})
    circle = None
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
    assert circle is None and len(graph) > 20


def test_the_two_wings_do_not_know_each_other():
    for wing, other in (("diffusion", "vlm"), ("vlm", "diffusion")):
        for path in (ROOT / "prefopt" / wing).rglob("*.py"):
            assert not below(imported(path), f"prefopt.{other}"), relative(path)


def test_only_evaluation_asks_the_oracle():
    asking = {relative(path) for path in FILES if below(imported(path), "prefopt.pocket.oracle")}
    rooms = ("prefopt/evaluation/", "scripts/pocket/", "scripts/studies/")
    assert asking
    assert all(path.startswith(rooms) for path in asking), asking


@pytest.mark.parametrize(
    ("names", "room"),
    [
        (r"Llava|LLaVA|Qwen|SmolVLM|PaliGemma|Idefics|InternVL", "prefopt/vlm/"),
        (r"UNet", "prefopt/diffusion/"),
    ],
    ids=["a VLM", "a UNet"],
)
def test_models_are_named_in_their_own_wing(names, room):
    elsewhere = [
        f"{relative(path)}: {found.group()}"
        for path in FILES
        if relative(path).startswith("prefopt/") and not relative(path).startswith(room)
        if (found := re.search(names, path.read_text()))
    ]
    assert not elsewhere


UNSAFE = {
    "remote code": r"trust_remote_code\s*=\s*True",
    "pickles": r"\b(torch|joblib)\.load\(|\bpickle\.loads?\(|weights_only=False|allow_pickle=True",
    "YAML objects": r"\byaml\.(load|unsafe_load|full_load)\(",
    "evaluated text": r"(?<![\w.])(eval|exec)\(|\bos\.system\(|shell\s*=\s*True",
    "unescaped HTML": r"autoescape\s*=\s*False|[\w\])]\s*\|\s*safe\b",
    "absolute places": r"[\"'](/home/|/root/|/work/|/Users/)",
}


@pytest.mark.parametrize("what", UNSAFE)
def test_nothing_unsafe_is_called(what):
    templates = [path for folder in FOLDERS[:2] for path in (ROOT / folder).rglob("*.jinja")]
    assert len(templates) >= 7
    found = [relative(path) for path in FILES + templates if re.search(UNSAFE[what], path.read_text())]
    assert not found


def test_recipes_bear_no_librarys_name():
    """`accelerate launch recipes/x.py` puts recipes/ first on the path: datasets.py would hide datasets."""
    libraries = set(packages_distributions()) | sys.stdlib_module_names | {"evaluate", "ultralytics", "wandb"}
    assert {"datasets", "peft", "prefopt"} <= libraries
    assert not libraries & {path.stem for path in ENTRY_POINTS}


# Quick to start: by what is imported, not by the clock


def loaded(program: str, *arguments: str) -> set[str]:
    """The modules that a program has loaded when it ends, with its exit code 0 or 2."""
    shown = (
        f"import sys, json, atexit; atexit.register(lambda: print(json.dumps(list(sys.modules)))); {program}"
    )
    done = subprocess.run(
        [sys.executable, "-c", shown, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2), done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str], names: tuple[str, ...]) -> set[str]:
    return {name for name in names if name in modules}


BESIDE_TORCH = (
    "diffusers",
    "peft",
    "datasets",
    "bitsandbytes",
    "matplotlib",
    "ultralytics",
    "transformers.trainer",
)
MISTAKES = {
    "help": ["--help"],
    "mistyped": ["--no_such_option", "1"],
    "wrong path": ["--model_name_or_path", "./nowhere"],
}


@pytest.fixture(scope="module")
def allowed() -> set[str]:
    """What transformers' TrainingArguments imports by itself may be imported where a model is trained."""
    return loaded("from transformers import TrainingArguments")


def asked() -> Iterator[Any]:
    """Every entry point with every mistake; where training's options take seconds, the furthest is enough."""
    for path, mistake in product(ENTRY_POINTS, MISTAKES):
        marks = [pytest.mark.slow] if path.stem in TRAINING and mistake != "wrong path" else []
        yield pytest.param(path, mistake, marks=marks, id=f"{path.stem}-{mistake}")


@pytest.mark.parametrize(("path", "mistake"), list(asked()))
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(path, mistake, allowed):
    run = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    modules = loaded(run, str(path), *MISTAKES[mistake])
    if path.stem in TRAINING:
        assert not heavy(modules - allowed, BESIDE_TORCH)
    else:
        assert not heavy(modules, ("torch", "accelerate", "pyarrow", *BESIDE_TORCH))


def test_importing_the_package_is_quick_and_loads_no_torch():
    program = (
        "import sys, time; start = time.process_time(); import prefopt; "
        "seconds = time.process_time() - start; "
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; assert seconds < 0.2, seconds"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_naming_the_pocket_loads_no_torch():
    program = (
        "import sys; from prefopt import pocket; assert pocket.resolve('pocket', 'clip').endswith('clip'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
