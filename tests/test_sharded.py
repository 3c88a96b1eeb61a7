"""Several processes of one run: equal to one, sharded or not; resumed; one of them killed."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from builds import contents
from launching import ROOT, arguments, launch
from pictures import write_ranked
from processes import run_two, shard, start_two
from running import logged, recipe
from safetensors.torch import load_file
from tiny import tiny_clip
from tiny_vlm import LLAVA_1_5, PEFT_ON_TRANSFORMERS_5, tiny_llava, vision_pairs

from prefopt.config import PreferenceConfig
from prefopt.errors import InputError
from prefopt.programs import FAILED, PRESETS, config_of, find_program
from prefopt.sharding import check_sharding

DPO = recipe("diffusion_dpo")
LAUNCHERS = PRESETS / "accelerate"


def launched_with(name: str) -> dict[str, str]:
    """What accelerate's launcher adds to the environment for one of our files."""
    words = ["--config_file", str(LAUNCHERS / f"{name}.yaml"), "recipe.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.to_dict().get("deepspeed_config", {}))
    told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ddp", {"ACCELERATE_USE_FSDP": None, "ACCELERATE_USE_DEEPSPEED": None}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            },
        ),
        ("deepspeed_zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        (
            "deepspeed_zero3",
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
            },
        ),
    ],
)
def test_the_launchers_files_are_what_accelerate_reads(name, told):
    assert name in {path.stem for path in LAUNCHERS.glob("*.yaml")}
    environment = launched_with(name)
    assert {key: environment.get(key) for key in told} == told
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "a recipe's own option sets it"


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        (FSDP, {}, "FSDP: accelerate splits a model over GPUs, and there are none"),
        (FSDP, {"ema_decay": 0.9}, "--ema_decay: under FSDP no process has all weights"),
        (FSDP | {"FSDP_VERSION": "1"}, {}, "FSDP 1 is not supported; set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP 1 is not supported"),
        ({}, {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "set it to false"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "set it to false"),
    ],
)
def test_what_sharding_cannot_do_is_refused(environment, options, said, setting, tmp_path, monkeypatch):
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        DPO.DiffusionDPOConfig(**setting, output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "diffusion_cpo",
            {"discriminator_mode": "adversarial", "discriminator_name_or_path": "."},
            "clips two",
        ),
        ("vlm_dpo", {"load_in_4bit": True}, "FSDP cannot split weights of 4 bits"),
        ("vlm_qlora_ensemble", {}, "train each with vlm_sft"),
        ("discriminator", {}, "every process has all of it"),
    ],
)
def test_what_a_recipe_cannot_share_out_is_refused(name, options, said, tmp_path, monkeypatch):
    for key, value in FSDP.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(PreferenceConfig, "check_shards", lambda self: None)
    config = config_of(find_program(name))
    with pytest.raises(InputError, match=said):
        config(model_name_or_path="pocket", dataset_name=str(tmp_path), output_dir=str(tmp_path), **options)


def test_precision_of_a_launchers_file_is_the_runs(setting, tmp_path, monkeypatch):
    """Guards: reference scores that are kept as float32 and were computed in bfloat16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = DPO.DiffusionDPOConfig(**setting, output_dir=str(tmp_path))
    assert (config.bf16, config.fp16, config.mixed_precision) == (True, False, "bf16")


@pytest.mark.parametrize(
    ("file", "sharding", "said"),
    [
        ("pytorch_model_fsdp.bin", None, "run under FSDP, and this one is under neither"),
        ("optimizer.pt", "FSDP", "run under neither FSDP nor DeepSpeed, and this one is under FSDP"),
        ("global_step3", "FSDP", "run under DeepSpeed, and this one is under FSDP"),
    ],
)
def test_a_checkpoint_of_another_sharding_is_refused(file, sharding, said, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=said):
        check_sharding(str(tmp_path), sharding)


# Runs


@pytest.fixture(scope="module")
def settings(setting, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Options of each recipe: two examples a batch, four steps, and a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("settings")
    vision_pairs().save_to_disk(folder / "rows")
    run = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3}
    run |= {"save_strategy": "steps", "save_steps": 2}
    images = setting | run
    answers = {"model_name_or_path": tiny_llava(folder / "model", template=LLAVA_1_5), **run}
    answers |= {"dataset_name": str(folder / "rows")}
    real = write_ranked(folder / "real", [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)], [[1, 2, 3]] * 4)
    shutil.copy(Path(real, "train.parquet"), Path(real, "test.parquet"))
    discriminator = {"model_name_or_path": images["model_name_or_path"], "dataset_name": real, **run}
    return {
        "diffusion_sft": images,
        "diffusion_dpo": images | {"beta_dpo": 200},
        "diffusion_cpo": images,
        "vlm_sft": answers,
        "vlm_dpo": answers,
        "vlm_qlora_ensemble": answers | {"members": ["lora_alpha=16", "lora_alpha=8"]},
        "discriminator": discriminator | {"widths": [8, 12], "cache_dir": folder / "cache"},
    }


RECIPES = ("diffusion_sft", "diffusion_dpo", "diffusion_cpo", "vlm_sft", "vlm_dpo")
FULL = {"no_use_peft": None, "learning_rate": 1e-4}


def run_one(name: str, options: dict[str, Any], folder: Path) -> Path:
    """A run of one process, which makes the steps of two."""
    options = options | {"gradient_accumulation_steps": 2, "output_dir": folder}
    launched = launch(f"recipes/{name}.py", options, folder.with_name("log-one"))
    assert launched.wait(300) == 0, launched.text()
    return folder


def weights(folder: Path) -> dict[str, Any]:
    """All weights that a run has saved, by file and name."""
    files = [file for file in folder.rglob("*.safetensors") if not {"cache", "features"} & set(file.parts)]
    files = [file for file in files if not any(part.startswith("checkpoint-") for part in file.parts)]
    return {
        f"{file.relative_to(folder)} {name}": value
        for file in files
        for name, value in load_file(file).items()
    }


def assert_equal(one: Path, two: Path, tolerance: float) -> None:
    """The losses and the weights of both runs are equal, but for rounding."""
    for log in sorted(one.rglob("metrics.jsonl")):
        other = two / log.relative_to(one)
        # CPO's likelihood term is a loss of about a thousand, in float32.
        assert logged(other.parent) == pytest.approx(logged(log.parent), abs=1e-5, rel=1e-6)
        assert len(set(logged(log.parent))) == 4
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys() and expected
    far = max((found[name].float() - value.float()).abs().max().item() for name, value in expected.items())
    print(f"{two.parent.name}: weights differ by {far:.1e} at most")
    assert far < tolerance


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
@pytest.mark.parametrize("name", [*RECIPES, "vlm_qlora_ensemble", "discriminator"])
def test_two_processes_equal_one(settings, name, tmp_path):
    one = run_one(name, settings[name], tmp_path / "one")
    run_two(f"recipes/{name}.py", settings[name] | {"output_dir": tmp_path / "two"}, tmp_path / "log")
    assert_equal(one, tmp_path / "two", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "all"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_that_share_the_weights_equal_one(settings, name, options, shards, tmp_path):
    """FSDP2: losses, what is saved, resuming, a finished run repeated."""
    options = settings[name] | options
    one = run_one(name, options, tmp_path / "one")
    hook = partial(shard, launched_with("fsdp2") | {"FSDP_STATE_DICT_TYPE": shards})
    two = options | {"output_dir": tmp_path / "two", "resume_from_checkpoint": None}
    script = f"recipes/{name}.py"
    run_two(script, two, tmp_path / "log", hook)
    assert_equal(one, tmp_path / "two", 2e-5)
    finished = weights(tmp_path / "two")
    for again in ("goes on", "is finished"):
        if again == "goes on":
            shutil.rmtree(tmp_path / "two" / "checkpoint-4")
        for file in [
            *(tmp_path / "two").glob("*.safetensors"),
            *(tmp_path / "two").glob("[um]*/*.safetensors"),
        ]:
            file.unlink()
        run_two(script, two, tmp_path / "log", hook)
        assert_equal(one, tmp_path / "two", 2e-5)
        assert weights(tmp_path / "two").keys() == finished.keys(), again


@pytest.fixture(scope="module")
def build(setting, tmp_path_factory) -> dict[str, Any]:
    """Options of a builder that has some seconds of work."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "prompts.txt").write_text("\n".join(f"{number} red lions" for number in range(2, 26)))
    return {
        "prompts": folder / "prompts.txt",
        "candidates": 4,
        "model_name_or_path": setting["model_name_or_path"],
        "judge_model_name_or_path": tiny_clip(folder / "clip"),
        "num_inference_steps": 4,
        "batch_size": 4,
        "block_size": 2,
        "test_fraction": 0.4,
    }


def pieces(folder: Path) -> list[Path]:
    """What a run or a build keeps when it is killed."""
    return [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("work/images-0/block-*.parquet")]


def results(folder: Path) -> dict[str, Any]:
    """What it has made."""
    return {name: value.tolist() for name, value in weights(folder).items()} or contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
@pytest.mark.parametrize("script", ["recipes/diffusion_dpo.py", "data_builders/text_to_image_pairs.py"])
def test_one_of_two_is_killed(settings, build, script, launcher, tmp_path):
    """The launcher and the other process end within 30 s; the same command then gives the whole result."""
    training = settings["diffusion_dpo"] | {"max_steps": 16, "resume_from_checkpoint": None}
    options = training if "recipes" in script else build
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run_two(script, options | {"output_dir": whole}, tmp_path / "log-whole")
    options = options | {"output_dir": folder}
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with (tmp_path / "log").open("w") as log:
            words = [*command, str(ROOT / script), *arguments(options)]
            agent = subprocess.Popen(words, stdout=log, stderr=log)
        wait_for_pieces(folder)
        victim = psutil.Process(agent.pid).children()[-1]
        assert script in " ".join(victim.cmdline())
        victim.kill()
        begun = time.monotonic()
        assert agent.wait(30) != 0
    else:
        first, second = start_two(script, options, tmp_path / "log")
        wait_for_pieces(folder)
        second.kill()
        begun = time.monotonic()
        assert first.wait(30) == FAILED, first.text()
        said = [line for line in first.text().splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and "another process of this run has ended" in said[0]
        assert "Traceback" not in first.text()
    print(f"{script} {launcher}: ended {time.monotonic() - begun:.1f} s after the kill")
    assert len(pieces(folder)) < len(pieces(whole)) or "recipes" in script
    run_two(script, options, tmp_path / "log-again")
    assert results(folder) == results(whole)


def wait_for_pieces(folder: Path) -> None:
    """Return when a run or a build in this folder has done some of its work."""
    end = time.monotonic() + 120
    while not pieces(folder):
        assert time.monotonic() < end
        time.sleep(0.01)
