"""How the house is built: imports go one way, names stay in their wings, and nothing unsafe is called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("prefopt", "data_builders", "recipes", "scripts")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PURE = ("losses", "ranking", "draws", "records")


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


@pytest.mark.parametrize("name", [name for name in PURE if (ROOT / "prefopt" / f"{name}.py").exists()])
def test_the_pure_modules_import_only_each_other(name):
    allowed = {"prefopt", *(f"prefopt.{other}" for other in PURE)}
    ours = below(imported(ROOT / "prefopt" / f"{name}.py"), "prefopt")
    assert {".".join(module.split(".")[:2]) for module in ours} <= allowed


def test_the_two_wings_do_not_know_each_other():
    for wing, other in (("diffusion", "vlm"), ("vlm", "diffusion")):
        for path in (ROOT / "prefopt" / wing).rglob("*.py"):
            assert not below(imported(path), f"prefopt.{other}"), relative(path)


def test_only_evaluation_asks_the_oracle():
    asking = {
        relative(path)
        for path in FILES
        if below(imported(path), "prefopt.pocket.oracle")
        and not relative(path).startswith(("prefopt/evaluation", "prefopt/pocket"))
    }
    assert asking <= {"recipes/compare_text_to_image.py", "scripts/pretrain_pocket.py"}


@pytest.mark.parametrize(
    ("names", "rooms"),
    [
        (
            r"Llava|LLaVA|Qwen|SmolVLM|PaliGemma|Idefics|InternVL",
            ("prefopt/vlm/", "prefopt/pocket/pretraining/"),  # the pocket's own has to be made somewhere
        ),
        (r"UNet", ("prefopt/diffusion/", "prefopt/pocket/")),
    ],
    ids=["a VLM", "a UNet"],
)
def test_models_are_named_in_their_own_wing(names, rooms):
    elsewhere = [
        f"{relative(path)}: {found.group()}"
        for path in FILES
        if relative(path).startswith("prefopt/") and not relative(path).startswith(rooms)
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
    templates = list((ROOT / "prefopt").rglob("*.jinja"))
    found = [relative(path) for path in FILES + templates if re.search(UNSAFE[what], path.read_text())]
    assert not found


def test_recipes_bear_no_librarys_name():
    """`accelerate launch recipes/x.py` puts recipes/ first on the path: datasets.py would hide datasets."""
    libraries = set(packages_distributions()) | sys.stdlib_module_names | {"evaluate", "ultralytics", "wandb"}
    assert {"datasets", "peft", "prefopt"} <= libraries
    assert not libraries & {path.stem for path in (ROOT / "recipes").glob("*.py")}


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
