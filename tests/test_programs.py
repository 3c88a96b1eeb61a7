"""Recipes, builders and presets by their names, from a checkout and from an installed wheel."""

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launching import ROOT
from running import recipe

from prefopt.__main__ import listing, main
from prefopt.cli import parse
from prefopt.errors import InputError
from prefopt.programs import BUILDERS, PRESETS, RECIPES, find_config, find_program, programs, summary
from prefopt.steps import fill_presets

PROGRAMS = programs(RECIPES) | programs(BUILDERS)


def test_every_program_has_a_name_of_its_own_and_a_line_in_the_list():
    assert (RECIPES, BUILDERS) == (ROOT / "recipes", ROOT / "data_builders")
    assert len(PROGRAMS) == len(programs(RECIPES)) + len(programs(BUILDERS)) >= 16
    lines = listing().splitlines()
    for name, path in PROGRAMS.items():
        assert summary(path).endswith("."), path
        assert any(line.split() == [name, *summary(path).split()] for line in lines)
    assert "diffusion_dpo_sd15.yaml" in lines[-1]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_name_all_are_listed(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prefopt", *words])
    main()
    assert capsys.readouterr().out == f"{listing()}\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "diffusion_dop",
            "no recipe or builder 'diffusion_dop'; did you mean diffusion_dpo? `prefopt --help`",
        ),
        ("self-rewarding", "did you mean self_rewarding?"),
        ("vlm_dpo.py", "did you mean vlm_dpo?"),
        ("compare", "did you mean compare_text_to_image or compare_vlm?"),
        ("12345", "no recipe or builder '12345'; `prefopt --help` lists all"),
    ],
)
def test_an_unknown_program_is_answered_with_the_nearest(name, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prefopt", name])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_program_runs_as_if_it_were_launched_by_its_path(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, run_name, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["prefopt", "vlm_dpo", "--lora_r", "4"])
    main()
    path = str(ROOT / "recipes" / "vlm_dpo.py")
    assert seen == [(path, "__main__", [path, "--lora_r", "4"])]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["prefopt", "self_rewarding", "--candidate", "3"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--candidate is no option; did you mean --candidates?" in capsys.readouterr().err
    assert find_program("self_rewarding") == ROOT / "data_builders" / "self_rewarding.py"


# Presets


def test_a_preset_is_found_by_its_name_where_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = PRESETS / "diffusion_dpo_pocket.yaml"
    for name in ("diffusion_dpo_pocket.yaml", "diffusion_dpo_pocket", str(preset)):
        assert find_config("config", name) == preset
    config = recipe("diffusion_dpo").DiffusionDPOConfig
    by_name = parse(config, ["--config", "diffusion_dpo_pocket.yaml"])
    assert by_name == parse(config, [f"--config={preset}"]) != parse(config, [])
    Path("diffusion_dpo_pocket.yaml").write_text("lora_r: 3\n")
    assert parse(config, ["--config", "diffusion_dpo_pocket.yaml"]).lora_r == 3, "a file comes first"


def test_an_unknown_preset_is_answered_with_those_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes/diffusion_dpo.py"])
    own = ", ".join(path.stem for path in sorted(PRESETS.glob("diffusion_dpo_*")))
    with pytest.raises(InputError) as error:
        parse(recipe("diffusion_dpo").DiffusionDPOConfig, ["--config", "diffusion_dpo_sd_15.yaml"])
    assert str(error.value) == (
        "--config: no file diffusion_dpo_sd_15.yaml, and no preset of this name; did you mean "
        f"diffusion_dpo_sd15? presets: {own}"
    )
    with pytest.raises(InputError, match=r"--config: no file no/such.yaml; name a YAML file of options$"):
        find_config("config", "no/such.yaml")


def test_a_step_of_a_recipe_takes_a_preset_by_its_name():
    class Options:
        build, dpo = "self_rewarding_build_sd21", "pocket"

    default = {name: PRESETS / f"self_rewarding_{name}_pocket.yaml" for name in ("build", "dpo")}
    fill_presets(Options, default, "pocket")
    assert Options.build == str(PRESETS / "self_rewarding_build_sd21.yaml")
    assert Options.dpo == str(default["dpo"])
    Options.build = "self_rewarding_biuld"
    with pytest.raises(InputError, match=r"--build: no file .*did you mean self_rewarding_build_") as error:
        fill_presets(Options, default, "pocket")
    assert "presets: self_rewarding_build_pocket, self_rewarding_build_sd21" in str(error.value)


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network and without a file left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    parts = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "prefopt", "data_builders", "recipes")
    for name in parts:
        (folder / name).symlink_to(ROOT / name)
    build = "import setuptools.build_meta as backend; backend.build_wheel('built')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "built").glob("*.whl")
    return built


def test_the_wheel_holds_every_program_preset_and_data_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    names = {"recipes": "prefopt_recipes", "prefopt": "prefopt", "data_builders": "data_builders"}
    expected = {
        "/".join((installed, *path.relative_to(ROOT / folder).parts))
        for folder, installed in names.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(expected) > 200
    assert {name for name in held if ".dist-info/" not in name} == expected
    (entry_points,) = (name for name in held if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "prefopt = prefopt.__main__:main" in text


@pytest.mark.slow
def test_an_installed_wheel_lists_helps_and_trains(wheel, tmp_path):
    target = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*install, str(wheel))
    assert run("-m", "prefopt", "--help") == f"{listing()}\n"
    assert "--beta_dpo" in run("-m", "prefopt", "diffusion_dpo", "--help")
    place = run("-c", "import prefopt.programs as p; print(p.RECIPES)").strip()
    assert place == str(target / "prefopt_recipes")
    accelerate = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1")
    settings = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    options = ("--max_steps", "1", "--max_train_samples", "4", "--output_dir", "run")
    run(
        *accelerate, *settings, "-m", "prefopt", "diffusion_dpo", "--config", "diffusion_dpo_pocket", *options
    )
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(("given", "spin"), [({}, "20000"), ({"OMP_WAIT_POLICY": "active"}, None)], ids=str)
def test_threads_that_wait_give_way_before_torch_is_loaded(given, spin):
    """Guards: OpenMP's threads that spin for 100 ms beside other programs."""
    code = (
        "import os, sys\n"
        "class Look:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Look())\n"
        "import prefopt.cli, torch\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", *given)}
    clean.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(spin), done.stderr
