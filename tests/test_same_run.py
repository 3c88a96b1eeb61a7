"""A run that is resumed with what it did not begin with: an error, in place of weights of both."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pictures import write_pairs
from running import train
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE
from prefopt.programs import RECIPES, config_of, programs
from prefopt.same_run import _DECIDING, _FREE, base_key

TRAININGS = ("diffusion_cpo", "diffusion_dpo", "diffusion_sft", "discriminator")
TRAININGS += ("vlm_dpo", "vlm_qlora_ensemble", "vlm_sft")
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
AGAIN = {**EVERY_STEP, "resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def begun(setting, tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(setting, folder, **EVERY_STEP, max_steps=2)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0\.001 \(now 0\.5\)"),
        ({"seed": 7, "beta_dpo": 9.0}, r"beta_dpo 5000\.0 \(now 9\.0\), seed 42 \(now 7\)"),
        ({"loss_type": "ipo"}, r"loss_type dpo \(now ipo\)"),
        ({"lora_alpha": 3}, r"lora_alpha 16 \(now 3\)"),
        ({"optim": "sgd"}, r"optim adamw_torch\w* \(now sgd\)"),
        ({"per_device_train_batch_size": 2}, r"examples a step 4 \(now 2\)"),
        ({"dataset_train_split": "train[:8]"}, r"rows \(SHA-256\) \w+ \(now \w+\)"),
    ],
)
def test_other_options_or_rows_are_an_error_and_leave_the_run_as_it_was(
    setting, begun, tmp_path, options, said
):
    """Guards: weights of two settings under a config.json that names one; a rate that is ignored."""
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = (folder / "config.json").read_bytes()
    for steps in (2, 3):  # finished, and to be continued
        with pytest.raises(InputError, match=rf"checkpoint-2 is of a run with {said}: continue it with"):
            train(setting, folder, **AGAIN | {"max_steps": steps} | options)
    assert (folder / "config.json").read_bytes() == before


def test_what_weights_do_not_depend_on_may_change(setting, begun, tmp_path):
    """More steps, another split of a batch, a folder and a dataset that were moved, other caches and logs."""
    whole = tmp_path / "whole"
    train(setting, whole, **EVERY_STEP, max_steps=3)
    shutil.copytree(begun, tmp_path / "moved")
    shutil.copytree(setting["dataset_name"], tmp_path / "data")
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "reference": "cache"}
    changed |= {"cache_dir": str(tmp_path / "cache"), "dataset_name": str(tmp_path / "data")}
    train(setting, tmp_path / "moved", **AGAIN | changed, max_steps=3, logging_steps=2, save_total_limit=1)
    one, other = (load_file(folder / ADAPTER_FILE) for folder in (whole, tmp_path / "moved"))
    assert all(torch.allclose(other[name], value, atol=1e-6) for name, value in one.items())


def test_labels_that_changed_are_other_rows(setting, tmp_path):
    data = write_pairs(tmp_path / "data", 12)
    train(setting, tmp_path / "run", **EVERY_STEP, max_steps=2, dataset_name=data)
    write_pairs(tmp_path / "data", 12, p_chosen=[0.75] * 12)
    with pytest.raises(InputError, match=r"checkpoint-2 is of a run with rows"):
        train(setting, tmp_path / "run", **AGAIN, max_steps=3, dataset_name=data)


def test_a_model_that_was_replaced_is_an_error(setting, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(setting["model_name_or_path"], model)
    options = {"model_name_or_path": str(model), "max_steps": 2}
    train(setting, tmp_path / "run", **EVERY_STEP | options)
    file = next((model / "unet").glob("*.safetensors"))
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"checkpoint-2 is of a run with weights at the start \(SHA"):
        train(setting, tmp_path / "run", **AGAIN | options | {"max_steps": 3})


def test_all_weights_are_compared_with_one_reference(setting, tmp_path):
    """Of a full fine-tuning the checkpoint holds the weights, and the base model is the reference."""
    model, options = tmp_path / "model", {**EVERY_STEP, "use_peft": False, "cache_dir": str(tmp_path / "c")}
    shutil.copytree(setting["model_name_or_path"], model)
    options |= {"model_name_or_path": str(model)}
    train(setting, tmp_path / "run", **options, max_steps=1)
    train(setting, tmp_path / "run", **AGAIN | options, max_steps=2, reference="cache")
    file = next((model / "unet").glob("*.safetensors"))
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    for reference in ("cache", "live"):
        with pytest.raises(InputError, match=r"checkpoint-2 is of a run with weights at the start \(SHA"):
            train(setting, tmp_path / "run", **AGAIN | options, max_steps=3, reference=reference)


def test_another_vae_is_an_error_with_or_without_a_cache(setting, begun, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(setting["model_name_or_path"], model)
    file = next((model / "vae").glob("*.safetensors"))
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    shutil.copytree(begun, tmp_path / "run")
    other = {"model_name_or_path": str(model), "encode": "live", "max_steps": 3}
    with pytest.raises(InputError, match=r"checkpoint-2 is of a run with VAE and text encoders \(SHA"):
        train(setting, tmp_path / "run", **AGAIN | other)


def test_a_checkpoint_of_another_run_starts_in_an_empty_folder(setting, begun, tmp_path):
    train(
        setting,
        tmp_path / "new",
        **EVERY_STEP,
        max_steps=3,
        resume_from_checkpoint=str(begun / "checkpoint-2"),
    )
    with pytest.raises(InputError, match="holds checkpoint-3 of an earlier run"):
        train(setting, tmp_path / "new", **EVERY_STEP, resume_from_checkpoint=str(begun / "checkpoint-2"))


def test_the_key_of_frozen_weights_leaves_trained_ones_out():
    def model(frozen: float, trained: float) -> nn.Module:
        made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        nn.init.constant_(made[0].requires_grad_(False).weight, frozen)
        for layer in made:
            nn.init.zeros_(layer.bias)
        nn.init.constant_(made[1].weight, trained)
        return made

    def key(*models: nn.Module, needs_reference: bool = False) -> str:
        return base_key(models[0], models[1] if models[1:] else None, needs_reference=needs_reference)

    assert key(model(1.0, 2.0)) == key(model(1.0, 3.0))
    assert len({key(model(value, 2.0)) for value in (1.0, 1.001)}) == 2
    # A reference that is a frozen copy, or was cached, is the model as it was before its first step.
    assert key(model(1.0, 2.0), model(1.0, 2.0), needs_reference=True) == key(
        model(1.0, 2.0), needs_reference=True
    )
    assert key(model(1.0, 2.0), needs_reference=True) != key(model(1.0, 3.0), needs_reference=True)


def test_every_name_is_an_option():
    """Guards: an option that was renamed, which would then decide, or no longer."""
    trainers = {field.name for field in fields(TrainingArguments)}
    trainings = [config_of(path) for name, path in programs(RECIPES).items() if name in TRAININGS]
    own = {field.name for config in trainings for field in fields(config)}
    assert trainers >= _DECIDING and own >= _FREE
