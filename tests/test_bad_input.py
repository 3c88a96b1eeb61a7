"""Whatever a user can get wrong: one message that says what and where, exit code 2, and nothing lost."""

import functools
import hashlib
import json
import math
import os
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from launching import arguments, launch
from pictures import PAIRS, cell, pair_rows, png, write_pairs, write_table
from running import recipe
from safetensors.torch import load_file
from tiny import tiny_adapter

from data_builders.text_to_image_pairs import TextToImagePairsConfig
from prefopt import cli
from prefopt.cli import BAD_INPUT, parse, run
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE

DPO, SFT = recipe("diffusion_dpo"), recipe("diffusion_sft")
CONFIGS = {DPO: DPO.DiffusionDPOConfig, SFT: SFT.DiffusionSFTConfig}


@pytest.fixture
def options(stable_diffusion, pairs, tmp_path) -> dict:
    """A run that works."""
    return {
        "model_name_or_path": stable_diffusion,
        "dataset_name": pairs,
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lora_r": 2,
    }


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a recipe as the command line does; the one message with which it ends with exit code 2."""

    def refused(options: dict, *more: str, module=DPO) -> str:
        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments(options), *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(module.main, CONFIGS[module])
        assert end.value.code == BAD_INPUT == 2
        lines = capsys.readouterr().err.strip().splitlines()
        messages = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        assert len(messages) == 1
        assert "Traceback" not in "\n".join(lines)
        return "\n".join(lines[messages[0] :])

    return refused


def trained(options: dict) -> None:
    """Run a recipe that works."""
    known = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    DPO.main(CONFIGS[DPO](**known))


# Data

BROKEN = {
    "one image": ({"rejected": [cell(png(1)), None]}, "row 1, column rejected has no image"),
    "undecodable": (
        {"chosen": [cell(png(0)), cell(b"no image")]},
        "row 1, column chosen: no image of",
    ),
    "0 bytes": ({"chosen": [cell(b""), cell(png(0))]}, "row 0, column chosen is an image of 0 bytes"),
    "1 x 1": (
        {"chosen": [cell(png(0)), cell(png(2, 1, 1))]},
        "row 1, column chosen: an image of 1 x 1 pixels",
    ),
    "prompt": ({"prompt": ["a", None]}, "row 1 has the prompt None; a prompt is text"),
    "ties": ({"margin": [0.0, 0.0]}, "none of its 2 rows can be used (2 tie)"),
    "margin": ({"margin": [1.0, -1.0]}, "row 1 has the margin -1.0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_rows(options, refused, tmp_path, what):
    columns, said = BROKEN[what]
    folder = write_pairs(tmp_path / "broken", 2, **columns)
    message = refused({**options, "dataset_name": folder})
    assert said in message and folder in message
    assert not (tmp_path / "run" / "config.json").exists(), "nothing was trained"


@pytest.mark.parametrize("module", [DPO, SFT], ids=["dpo", "sft"])
def test_missing_tables_and_columns(options, refused, tmp_path, module):
    (tmp_path / "empty").mkdir()
    nowhere = tmp_path / "nowhere"
    message = refused({**options, "dataset_name": nowhere}, module=module)
    assert f"--dataset_name: there is no {nowhere}" in message
    message = refused({**options, "dataset_name": tmp_path / "empty"}, module=module)
    assert f"{tmp_path / 'empty'} is empty" in message
    features = datasets.Features({name: PAIRS[name] for name in ("prompt", "rejected")})
    columns = {name: pair_rows(2)[name] for name in features}
    folder = write_table(tmp_path / "columns", columns, features)
    message = refused({**options, "dataset_name": folder}, module=module)
    lost = "chosen" if module is DPO else "image"
    assert f"no column '{lost}'; its columns are ['prompt', 'rejected']" in message


# Options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta_dpoo", "3"], "--beta_dpoo"),
        (["--loss_type", "ppo"], "ppo"),
        (["--max_steps", "many"], "--max_steps"),
        (["--beta_dpo", "0"], "--beta_dpo is 0.0"),
        (["--label_smoothing", "0.5"], "--label_smoothing is 0.5; it lies in [0, 0.5)"),
        (["--flip_probability", "2"], "--flip_probability is 2.0; it lies in [0, 1]"),
        (["--timestep_range", "0.5"], "--timestep_range 0.5: name its two ends"),
        (["--timestep_range", "0.5", "0.2"], "--timestep_range 0.5 0.2: name its two ends, the lower first"),
        (["--timestep_range", "nan", "1"], "--timestep_range is nan; it lies in [0, 1]"),
        (["--drop_probability", "-1"], "--drop_probability is -1.0"),
        (["--visits", "0"], "--visits is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--ema_decay", "1"], "--ema_decay is 1.0"),
        (["--dtype", "bfloat16", "--no_use_peft"], "--dtype bfloat16 is for frozen weights"),
        (["--adapter_name_or_path", "a", "--no_use_peft"], "leave out --no_use_peft"),
        (["--config"], "--config takes one YAML file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resolution", "15"], "--resolution 15 is no multiple of 2"),
        (["--lora_target_modules", "nothing"], "--lora_target_modules"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unknown_and_impossible_options(options, refused, words, said):
    assert said in refused(options, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("beta_dpoo: 3", "beta_dpoo"),
        ("env: {A_VARIABLE: '1'}", "env"),
        ("loss_type: ppo", "loss_type is 'ppo'; choose from dpo, ipo, hinge, robust"),
        ("seed: many", "seed"),
        ("seed: 1.5", "seed"),
        ("- a list", "config.yaml is a list, no mapping"),
        ("beta_dpo: [1, 2", "line 1"),
        ("beta_dpo: !!python/object/apply:os.getcwd []", "python/object"),
    ],
)
def test_unknown_and_impossible_values_in_a_file(options, refused, tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert said in refused(options, "--config", str(path))
    assert said in refused(options, f"--config={path}")


def test_a_file_gives_values_and_flags_win(options, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(
        "beta_dpo: 7\nlearning_rate: 1e-3\nloss_type: ipo\nlora_target_modules: to_q\nbf16: true\n"
    )
    seen = []
    words = [*arguments(options), f"--config={path}", "--loss_type", "hinge"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    run(seen.append, CONFIGS[DPO])
    config = seen[0]
    assert (config.beta_dpo, config.learning_rate, config.loss_type) == (7.0, 1e-3, "hinge")
    assert (config.lora_target_modules, config.bf16) == (["to_q"], True)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge", "robust"])
def test_every_loss_type_runs(options, loss_type):
    """Guards: `--loss_type ipo` reads an argument that does not exist. Here D is 0 and beta 1."""
    smoothing = 0.1 if loss_type in ("dpo", "robust") else 0.0
    trained({**options, "loss_type": loss_type, "beta_dpo": 2.0, "label_smoothing": smoothing})
    line = json.loads((options["output_dir"] / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"dpo": math.log(2), "ipo": 0.25, "hinge": 1.0, "robust": math.log(2)}[loss_type]
    assert line["loss"] == pytest.approx(expected, abs=1e-6)


# Models


def test_models_that_are_not_there(options, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused({**options, "model_name_or_path": tmp_path / "no"})
    assert f"--model_name_or_path: there is no {tmp_path / 'no'}" in message
    message = refused({**options, "model_name_or_path": tmp_path / "empty"})
    assert f"{tmp_path / 'empty'} is no pipeline: it holds no model_index.json" in message
    assert "nobody/nothing" in refused({**options, "model_name_or_path": "nobody/nothing"})


def test_adapters_that_do_not_fit(options, refused, sdxl, tmp_path):
    adapter = tiny_adapter(sdxl, tmp_path / "lora")
    message = refused({**options, "adapter_name_or_path": adapter})
    assert (
        adapter in message
        and "does not fit the model" in message
        and options["model_name_or_path"] in message
    )
    message = refused({**options, "adapter_name_or_path": tmp_path / "none"})
    assert f"--adapter_name_or_path: there is no {tmp_path / 'none'}" in message


# What is kept


def test_a_stale_cache(options, refused, tmp_path):
    options["cache_dir"] = tmp_path / "cache"
    trained(options)
    message = refused({**options, "output_dir": tmp_path / "other", "resolution": 32})
    assert "resolution: 16 (cache), 32 (this run)" in message
    assert str(tmp_path / "cache") in message and "--cache_dir" in message


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the SHA-256 of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_earlier_run_is_not_overwritten(options, refused):
    options |= {"save_strategy": "steps"}
    trained(options)
    before = files(options["output_dir"])
    message = refused(options)
    assert f"{options['output_dir']} holds checkpoint-1 of an earlier run" in message
    assert message == refused({**options, "dataset_name": "my/data"}), "before anything is read"
    assert "--resume_from_checkpoint" in message
    assert files(options["output_dir"]) == before


def test_a_checkpoint_of_another_rank(options, refused):
    options |= {"save_strategy": "steps"}
    trained(options)
    options |= {"lora_r": 4, "max_steps": 2}
    assert "checkpoint-1 is of a run with lora_r 2 (now 4)" in refused(options, "--resume_from_checkpoint")
    Path(options["output_dir"], "config.json").unlink()  # without which it is the weights that do not fit
    message = refused(options, "--resume_from_checkpoint")
    assert "checkpoint-1" in message and "does not fit" in message


def test_a_loss_that_is_not_finite_names_its_rows(options, refused, tmp_path):
    """By their number in the file, though its first row is dropped; the checkpoint before is kept."""
    folder = write_pairs(tmp_path / "pairs", 3, margin=[0.0, 1.0, 1.0])
    options |= {"dataset_name": folder, "save_strategy": "steps", "save_steps": 1}
    message = refused({**options, "max_steps": 3, "learning_rate": 1e30})
    assert "the loss is not finite at step 2" in message
    assert f"{folder}: row 1" in message and f"{folder}: row 2" in message
    kept = [path.name for path in options["output_dir"].glob("checkpoint-*")]
    assert kept == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_not_saved(options, refused):
    """Guards: a run that ends well with them, and checkpoints that hold nothing finite."""
    message = refused({**options, "learning_rate": 1e38, "save_strategy": "steps", "save_steps": 1})
    assert "after step 1" in message and "trained tensors are not finite" in message
    assert "nothing was saved" in message
    assert not list(options["output_dir"].glob("*.safetensors"))
    assert not list(options["output_dir"].glob("checkpoint-*"))


def test_weights_that_are_not_finite_leave_the_last_good_checkpoint(options, refused):
    """Guards: a checkpoint of NaN that takes the last good one's place."""
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    options |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}  # the first step is of rate 0
    message = refused({**options, "learning_rate": 1e39})
    assert "after step 2" in message and "The last checkpoint is untouched" in message
    assert [path.name for path in options["output_dir"].glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(options["output_dir"] / "checkpoint-1" / ADAPTER_FILE)
    assert all(value.isfinite().all() for value in saved.values())


# By path, as a user runs it


def test_by_path_a_missing_dataset(options, tmp_path):
    running = launch(
        "recipes/diffusion_dpo.py", {**options, "dataset_name": tmp_path / "no"}, tmp_path / "log"
    )
    assert running.wait() == 2
    last = running.text().strip().splitlines()[-1]
    assert last == f"error: --dataset_name: there is no {tmp_path / 'no'}"
    assert "Traceback" not in running.text()


def test_by_path_an_unknown_option(options, tmp_path):
    running = launch("recipes/diffusion_sft.py", {**options, "beta_dpo": 3}, tmp_path / "log")
    assert running.wait() == 2
    assert running.text() == "error: --beta_dpo is no option; --help shows those there are\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batchsize", "3"], "--batchsize is no option; did you mean --batch_size?"),
        (["--no_galery"], "--no_galery is no option; did you mean --no_gallery?"),
        (["--batch_size", "3", "4"], "'4' is no option and belongs to none"),
        (["--xyzzy=1"], "--xyzzy is no option; --help shows those there are"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse(TextToImagePairsConfig, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--system", "base", "dpo=runs/x"], "--system is no option; did you mean --systems?"),
        (["--nonsense"], "--nonsense is no option"),
        (["--config", "FILE"], "options.yaml: 'system' is no option; did you mean systems?"),
    ],
)
def test_a_mistyped_option_is_answered_before_a_config_looks_for_anything(words, said, tmp_path, monkeypatch):
    compare, looked = recipe("compare_text_to_image"), []
    monkeypatch.setattr(compare.CompareConfig, "__post_init__", lambda self: looked.append(self))
    config = tmp_path / "options.yaml"
    config.write_text("system: [base]\n")
    with pytest.raises(InputError, match=re.escape(said)):
        parse(compare.CompareConfig, [str(config) if word == "FILE" else word for word in words])
    assert not looked


def test_a_mistyped_key_of_a_file_is_answered_with_the_nearest_option(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("batchsize: 3\n")
    with pytest.raises(InputError, match="'batchsize' is no option; did you mean batch_size"):
        parse(TextToImagePairsConfig, ["--config", str(config)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha has no effect in this recipe; leave it out"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing is that of preferences"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size has no effect"),
        ({"do_eval": True}, "--do_eval has no effect"),
        ({"report_to": "nobody"}, "--report_to nobody: "),
        ({"report_to": "dvclive"}, "--report_to dvclive: DVCLiveCallback requires dvclive to be installed"),
        ({"eval_strategy": "steps"}, "--eval_strategy measures examples that are held out"),
        ({"dataset_test_split": "test"}, "add --eval_strategy steps, or epoch"),
        (
            {"dataset_test_split": "train", "eval_strategy": "steps"},
            "--dataset_test_split train and --dataset_train_split train share rows, or may share some; name",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, refused, changes, said):
    assert said in refused({**options, **changes})


LAUNCHER = ["python", "/usr/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("words", "environment", "asked"),
    [
        ([*LAUNCHER, "--num_processes", "2", "recipe.py"], {}, 2),
        ([*LAUNCHER, "--num-processes=3", "--cpu", "recipe.py", "--num_processes", "9"], {}, 3),
        ([*LAUNCHER, "--num_processes", "2", "recipe.py"], {"WORLD_SIZE": "2"}, None),
        ([*LAUNCHER, "--num_processes", "1", "recipe.py"], {}, None),
        ([*LAUNCHER, "recipe.py", "--num_processes", "4"], {}, None),
        (["bash", "launch", "--num_processes", "2"], {}, None),
    ],
)
def test_one_process_where_several_were_asked_for_is_an_error(words, environment, asked, monkeypatch):
    """Guards: `accelerate launch --num_processes 2` without GPUs, which starts one and says nothing."""
    parent = SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr(cli.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if asked is None:
        cli.check_launch()
        return
    with pytest.raises(
        InputError, match=rf"asked for {asked} processes and started one.*--nproc_per_node {asked}"
    ):
        cli.check_launch()


def fill_disk(number: int, limit: int) -> None:
    """A hook: from the `number`-th checkpoint on, no file may grow past `limit` bytes."""
    from prefopt.trainer import PreferenceTrainer

    save, calls = PreferenceTrainer._save_checkpoint, []

    def save_on_full_disk(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(self, *args, **kwargs)

    PreferenceTrainer._save_checkpoint = save_on_full_disk


@pytest.mark.parametrize("limit", [2500, 12_000], ids=["weights", "optimizer"])
def test_by_path_a_full_disk_while_saving(options, tmp_path, limit):
    """The earlier checkpoint stays as it was, no half one is beside it, and the run goes on from there."""
    folder = options["output_dir"]
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    hook = functools.partial(fill_disk, 2, limit)
    running = launch("recipes/diffusion_dpo.py", options, tmp_path / "log", hook)
    assert running.wait() == 2
    assert "error: could not write" in running.text() and "checkpoint-2" in running.text()
    assert "File too large" in running.text() or "iostream error" in running.text()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    before = files(folder / "checkpoint-1")
    options |= {"resume_from_checkpoint": "latest", "save_total_limit": 5}
    running = launch("recipes/diffusion_dpo.py", options, tmp_path / "log")
    assert running.wait() == 0, running.text()
    assert f"resuming from {folder / 'checkpoint-1'}" in running.text()
    assert files(folder / "checkpoint-1") == before
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_revision_of_what_is_on_this_machine_is_refused(options, refused, what):
    message = refused({**options, f"{what}_revision": "main"})
    place = options["model_name_or_path" if what == "model" else "dataset_name"]
    assert message.startswith(f"error: --{what}_revision main: {place} is on this machine and has no revisi")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--revision", "main"], "--revision main: pocket is on this machine"),
        (["--judge_revision", "main"], "--judge_revision main: pocket is on this machine"),
        (["--sources", "pocket steps=4 revision=main"], "revision=main': pocket is on this machine"),
    ],
)
def test_a_revision_of_the_pocket_is_refused(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse(TextToImagePairsConfig, words)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "train[:10%]"),
        ("train+validation", "validation"),
        ("train", "test+train[:5]"),
        ("train[:90%]", "train[80%:]"),
        ("train[500:]", "train[:501]"),
        ("train[500:]", "train[:10%]"),  # may, by the number of rows
        ("train[:90%]", "train[-10%:]"),  # of 15 rows, 13.5 is rounded up and 1.5 is, too
    ],
)
def test_overlapping_splits_are_refused(options, refused, train, test):
    options |= {"dataset_train_split": train, "dataset_test_split": test, "eval_strategy": "steps"}
    said = f"--dataset_test_split {test} and --dataset_train_split {train} share rows, or may share some"
    assert said in refused(options)


@pytest.mark.parametrize(
    ("load", "threads", "advised"), [(6.5, None, True), (6.5, "2", False), (0.4, None, False)]
)
def test_a_busy_machine_is_named_unless_the_threads_are_chosen(load, threads, advised, monkeypatch):
    """Guards: 18 seconds a step in place of 0.2, because OpenMP's threads wait for each other."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert ("load 6.5 on 2 cores" in cli.busy_machine()) == advised
