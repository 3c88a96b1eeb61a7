"""Several methods on one table: what each step is told, and which options are refused."""

import json
from pathlib import Path

import pytest
import yaml
from launching import ROOT, launch
from running import recipe

from data_builders.text_to_image_pairs import TextToImagePairsConfig
from prefopt.cli import parse
from prefopt.errors import InputError

CONFIGS = ROOT / "recipes" / "configs"
CLASSES = {"sft": "DiffusionSFTConfig", "dpo": "DiffusionDPOConfig", "cpo": "DiffusionCPOConfig"}
REAL = {"model_name_or_path": "some/model", "discriminator_name_or_path": "some/discriminator"}
FILES = {name: str(CONFIGS / f"methods_{name}_pocket.yaml") for name in (*CLASSES, "compare")}


@pytest.fixture(scope="module")
def methods():
    """The recipe as a module."""
    return recipe("diffusion_methods")


def after(command, flag):
    """The word that follows a flag."""
    return command[command.index(f"--{flag}") + 1]


def test_every_step_is_a_script_with_options_that_it_knows(methods, tmp_path):
    steps = methods.steps_of(methods.MethodsConfig(), tmp_path)
    assert list(steps) == ["data", "sft", "dpo", "cpo", "cpo_discriminator", "compare"]
    (tmp_path / "data").mkdir()
    for name, command in steps.items():
        kind = TextToImagePairsConfig if name == "data" else None
        kind = kind or getattr(recipe(Path(command[0]).stem), CLASSES.get(name[:3], "CompareConfig"))
        for trained in (n for n in steps if n not in ("data", "compare")):
            (tmp_path / trained).mkdir(exist_ok=True)
            (tmp_path / trained / "pytorch_lora_weights.safetensors").touch()
        config = parse(kind, [word for word in command[1:] if word != "--resume_from_checkpoint"])
        written = yaml.safe_load(Path(after(command, "config")).read_text())
        assert all(getattr(config, key) == value for key, value in written.items())


def test_all_methods_read_the_same_lists_and_one_has_the_discriminator(methods, tmp_path):
    steps = methods.steps_of(methods.MethodsConfig(), tmp_path)
    for name in ("sft", "dpo", "cpo", "cpo_discriminator"):
        assert after(steps[name], "dataset_name") == str(tmp_path / "data")
        assert after(steps[name], "dataset_config") == "ranked"
        assert after(steps[name], "cache_dir") == str(tmp_path / "cache"), "each image is encoded once"
        assert ("--discriminator_name_or_path" in steps[name]) == (name == "cpo_discriminator")
    assert steps["cpo"][0] == steps["cpo_discriminator"][0]
    start = steps["compare"].index("--systems")
    names = ("sft", "dpo", "cpo", "cpo_discriminator")
    assert steps["compare"][start + 1 : start + 6] == ["base", *(f"{n}={tmp_path / n}" for n in names)]
    assert after(steps["compare"], "discriminator_name_or_path") == "pocket"


def test_a_table_of_the_user_is_not_built_and_a_subset_needs_no_other_options(methods, tmp_path):
    config = methods.MethodsConfig(
        model_name_or_path="some/model",
        dataset_name="some/pairs",
        methods=["dpo"],
        dpo=FILES["dpo"],
        compare=FILES["compare"],
    )
    steps = methods.steps_of(config, tmp_path)
    assert list(steps) == ["dpo", "compare"]
    assert after(steps["dpo"], "dataset_name") == "some/pairs" and "--dataset_config" not in steps["dpo"]
    assert "--discriminator_name_or_path" not in steps["compare"]


def test_a_weight_is_the_options_own_unless_one_is_given(methods, tmp_path):
    steps = methods.steps_of(methods.MethodsConfig(), tmp_path)
    assert not any("--discriminator_weight" in command for command in steps.values())
    steps = methods.steps_of(methods.MethodsConfig(discriminator_weight=5.0), tmp_path)
    assert [name for name in steps if "--discriminator_weight" in steps[name]] == ["cpo_discriminator"]
    assert after(steps["cpo_discriminator"], "discriminator_weight") == "5.0"


def test_a_discriminator_among_the_options_of_cpo_would_be_in_both(methods, tmp_path):
    file = tmp_path / "cpo.yaml"
    file.write_text("discriminator_name_or_path: pocket\n")
    with pytest.raises(InputError, match="names a discriminator, so that cpo would have one, too"):
        methods.MethodsConfig(cpo=str(file))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["kto"]}, "--methods kto: name each once, of sft, dpo, cpo, cpo_discriminator"),
        ({"methods": ["dpo", "dpo"]}, "name each once"),
        ({"methods": []}, "at least one"),
        ({"discriminator_weight": -1.0}, "--discriminator_weight"),
        ({"num_processes": 0}, "--num_processes"),
        (REAL | FILES, "name a --dataset_name, or with --build"),
        ({"dataset_name": "a/b", "build": FILES["dpo"]}, "leave one of them out"),
        (REAL | {"dataset_name": "a/b"}, "--compare is missing"),
        (
            FILES | {"model_name_or_path": "a/b", "dataset_name": "a/b"},
            "--discriminator_name_or_path is missing",
        ),
        ({"cpo": "no.yaml"}, "--cpo: no file no.yaml"),
        ({"compare": str(ROOT / "README.md")}, "is no YAML file of options"),
        ({"dataset_config": "pairs"}, "--dataset_config belongs to a --dataset_name"),
        ({"discriminator_name_or_path": "./none"}, "--discriminator_name_or_path: there is no ./none"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(methods, options, said):
    with pytest.raises(InputError, match=said):
        methods.MethodsConfig(**options)


@pytest.mark.slow
def test_by_path_all_are_trained_and_compared_on_one_page_and_nothing_is_done_twice(tmp_path):
    """The whole recipe on the pocket, each step at its smallest."""
    training = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_r": 2,
        "save_steps": 1,
        "logging_steps": 1,
    }
    compare = {"num_prompts": 4, "num_seeds": 1, "num_inference_steps": 1, "guidance_scales": [1.0, 2.0]}
    files = {
        "build": {"num_prompts": 4, "candidates": 2, "num_inference_steps": 1, "gallery": False},
        "sft": training,
        "dpo": training,
        "cpo": training | {"discriminator_weight": 2.0},
        "compare": compare | {"judge_model_name_or_path": "pocket"},
    }
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    options = {name: tmp_path / f"{name}.yaml" for name in files} | {"output_dir": tmp_path / "run"}
    running = launch("recipes/diffusion_methods.py", options, tmp_path / "log")
    assert running.wait(600) == 0, running.text()
    summary = json.loads((tmp_path / "run" / "compared" / "summary.json").read_text())
    assert list(summary["best"]["chosen"]) == ["base", "sft", "dpo", "cpo", "cpo_discriminator"]
    assert {"clip", "oracle/all", "discriminator", "judge"} <= summary["metrics"].keys()
    page = (tmp_path / "run" / "compared" / "report.html").read_text()
    assert all(name in page for name in ("cpo_discriminator", "discriminator logit", "judge&#39;s score"))
    terms = (tmp_path / "run" / "cpo_discriminator" / "metrics.jsonl").read_text()
    assert "discriminator/term" in terms
    assert "discriminator/term" not in (tmp_path / "run" / "cpo" / "metrics.jsonl").read_text()
    before = (tmp_path / "run" / "compared" / "report.html").stat().st_mtime_ns
    again = launch("recipes/diffusion_methods.py", options, tmp_path / "log-again")
    assert again.wait() == 0 and again.text().count("is done") == 6
    assert (tmp_path / "run" / "compared" / "report.html").stat().st_mtime_ns == before
