"""What a run's weights depend on: a run that is resumed has to go on with the same.

The optimizer and the learning rate's schedule come from the checkpoint, and everything else from the options:
a run that went on with others would be of both, while its config.json and its card name the new ones alone.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from prefopt.adapters import POLICY
from prefopt.config import PreferenceConfig
from prefopt.errors import InputError
from prefopt.files import read_object
from prefopt.runs import CONFIG_FILE

SAMPLE = 64  # numbers of each tensor that tell two models apart

# Of transformers' options, those that weights depend on, besides the batches and the number of steps.
_DECIDING = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"}
_DECIDING |= {"adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed"}
_DECIDING |= {"optim", "optim_args", "optim_target_modules", "bf16", "fp16"}
# Of this package's, those that weights do not depend on: where results are kept, how they are computed, and
# what is only measured.
_FREE = {"reference", "encode", "vision_features", "cache_dir", "resume_from_checkpoint", "output_dir"}
_FREE |= {"shared_prefix", "row_tokens", "attn_implementation", "early_stopping_patience"}
_FREE |= {"validation_prompts", "validation_steps", "validation_inference_steps"}
_FREE |= {"validation_guidance_scale", "dataset_test_split"}
_FREE |= {"members", "average_rank"}  # a member's own options are the run's
# And those that name a place, or the rows of it: a place may be moved, and its content is compared.
_FREE |= {"model_name_or_path", "adapter_name_or_path", "discriminator_name_or_path"}
_FREE |= {"model_revision", "dataset_revision", "variant"}
_FREE |= {"dataset_name", "dataset_config", "dataset_train_split", "max_train_samples", "test_fraction"}
_FREE |= {"test_size", "split_seed"}


def check_options(checkpoint: str | Path, config: PreferenceConfig) -> None:
    """InputError for options that the weights depend on, and that the checkpoint's run had otherwise."""
    own = {field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)}
    now = json.loads(json.dumps(config.to_dict(), default=str))
    _check(checkpoint, "options", {name: now[name] for name in sorted((own - _FREE) | _DECIDING)})


def check_made_of(checkpoint: str | Path, made_of: Mapping[str, Any]) -> None:
    """InputError for another batch, other rows or other frozen weights than the checkpoint's run had."""
    _check(checkpoint, "made_of", made_of)


def base_key(model: nn.Module, reference: nn.Module | None, *, needs_reference: bool) -> str:
    """The key of the weights that a run starts from and no step changes, see `sampled_key`.

    They are those around the adapters; of a model without any, whose checkpoints hold all weights, those of
    the reference, which are the model's own before its first step.
    """
    adapted = any(_is_policy(name) for name, _ in model.named_parameters())
    if adapted or not needs_reference:
        return sampled_key(model, reference, only_frozen=True)
    return sampled_key(reference or model)


def sampled_key(*models: nn.Module | None, only_frozen: bool = False) -> str:
    """The SHA-256 over a sample of every weight.

    It takes no time to speak of, and two models that were trained in any way differ in it.
    """
    digest = hashlib.sha256()
    for model in filter(None, models):
        for name, value in model.named_parameters():
            if value.is_floating_point() and not (only_frozen and (value.requires_grad or _is_policy(name))):
                sample = value.detach().flatten()[:SAMPLE].cpu().double()
                digest.update(f"{name} {tuple(value.shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()


def _is_policy(name: str) -> bool:
    return f".{POLICY}." in name


def _check(checkpoint: str | Path, part: str, now: Mapping[str, Any]) -> None:
    """Compare with a part of the config.json of the checkpoint's run, in what both have."""
    file = Path(checkpoint).parent / CONFIG_FILE
    if not file.is_file():  # the checkpoint was copied out of its run, or the file deleted
        return
    before = read_object(file, "Delete it, and run the same command again").get(part)
    if not isinstance(before, dict):
        return
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        told = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in changed)
        raise InputError(
            f"{checkpoint} is of a run with {told}: continue it with what it had, or start another run, in "
            "another --output_dir and without --resume_from_checkpoint"
        )
