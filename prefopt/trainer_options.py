"""What the options of transformers' Trainer need to be, which checks them late, after encoding, or never."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments, get_scheduler

from prefopt.errors import InputError
from prefopt.options import check_needs, default_of, shown

# Options that nothing here reads, and what to use in their place.
IDLE = {
    "label_smoothing_factor": ": --label_smoothing is that of preferences",
    "neftune_noise_alpha": "",
    "use_liger_kernel": "",
    "liger_kernel_config": "",
    "auto_find_batch_size": ": an epoch's order is planned for one batch size",
    "prediction_loss_only": "",
    "include_for_metrics": "",
    "batch_eval_metrics": "",
    "label_names": "",
    "train_sampling_strategy": ": the order is that of the seed",
    "length_column_name": "",
    "dataloader_drop_last": ": the last batch of an epoch is filled up",
    "do_train": "",
    "do_eval": ": --eval_strategy and a test split evaluate",
    "do_predict": "",
}
# Options that only evaluation reads.
OF_EVALUATION = (
    "bf16_full_eval",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "fp16_full_eval",
    "greater_is_better",
    "load_best_model_at_end",
    "metric_for_best_model",
)
OF_UPLOADING = ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token")
OF_ACCELERATE = ("non_blocking", "use_configured_state")  # the rest is about batches, which are planned here
OF_WORKERS = ("dataloader_multiprocessing_context", "dataloader_persistent_workers")


def check_trainer_options(config: TrainingArguments) -> None:
    """InputError for what the Trainer would refuse late or ignore; before its own checks and defaults."""
    _refuse_idle(config)
    _read_mappings(config)
    _check_evaluation(config)
    for names, needed in ((OF_UPLOADING, "push_to_hub"), (OF_WORKERS, "dataloader_num_workers")):
        for name in names:
            if not _is_default(config, name):
                check_needs(config, name, needed)
    if _word(config.lr_scheduler_type) == "constant" and config.warmup_steps:
        raise InputError(
            "--warmup_steps has no effect with --lr_scheduler_type constant; take constant_with_warmup, or "
            "leave it out"
        )
    _check_compiling(config)
    if config.ddp_backend and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "--ddp_backend is for several processes, and this is one: start them with torchrun or accelerate "
            "launch, or leave it out"
        )


def check_training(config: TrainingArguments) -> None:
    """InputError for a tracker, schedule or optimizer that cannot be made; after the Trainer's checks."""
    _check_uploading(config)
    _check_trackers(config)
    _check_schedule(config)
    _check_optimizer(config)


def _refuse_idle(config: TrainingArguments) -> None:
    """InputError for an option that nothing here reads: it would be a promise not kept."""
    if config.remove_unused_columns:
        raise InputError("--remove_unused_columns would drop what this recipe reads; leave it out")
    for name, instead in IDLE.items():
        if not _is_default(config, name):
            raise InputError(f"--{name} has no effect in this recipe{instead}; leave it out")


def _is_default(config: TrainingArguments, name: str) -> bool:
    field = next(field for field in fields(TrainingArguments) if field.name == name)
    return getattr(config, name) == default_of(field)


def _read_mappings(config: TrainingArguments) -> None:
    """Read the options that are JSON, or the name of a JSON file; InputError for what is neither."""
    for name in config._VALID_DICT_FIELDS:
        given = getattr(config, name)
        if not isinstance(given, str):
            continue
        try:
            is_text = given.lstrip().startswith("{")
            mapping = json.loads(given if is_text else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"--{name} is {shown(given)}, which is no JSON and no file of it: {str(error)[:300]}"
            ) from error
        if not isinstance(mapping, dict):
            raise InputError(f"--{name} is {shown(given)}; it is a JSON object, {{...}}")
        setattr(config, name, mapping)
    if config.deepspeed == {}:
        raise InputError("--deepspeed is empty; name a JSON file of its settings, or leave it out")
    if isinstance(config.accelerator_config, dict):
        for name in config.accelerator_config:
            if name not in OF_ACCELERATE:
                raise InputError(
                    f"--accelerator_config: {shown(name)} cannot be set, for the order and the "
                    f"batches of an epoch are planned here; it takes {' and '.join(OF_ACCELERATE)}"
                )


def _check_evaluation(config: TrainingArguments) -> None:
    """InputError for options of evaluation in a run that evaluates nothing."""
    if _word(config.eval_strategy) != "no":
        return
    if _word(config.save_strategy) == "best":
        raise InputError("--save_strategy best saves after an evaluation; add --eval_strategy steps or epoch")
    for name in OF_EVALUATION:
        if not _is_default(config, name):
            raise InputError(
                f"--{name} is for evaluation; add --eval_strategy steps or epoch, or leave it out"
            )


def _check_compiling(config: TrainingArguments) -> None:
    """InputError for a way to compile that torch does not know."""
    if config.torch_compile_backend is None and config.torch_compile_mode is None:
        return
    from torch import _dynamo, _inductor  # takes a second

    choices = {
        "torch_compile_backend": _dynamo.list_backends(None),
        "torch_compile_mode": list(_inductor.list_mode_options()),
    }
    for name, known in choices.items():
        if (given := getattr(config, name)) is not None and given not in known:
            raise InputError(f"--{name} is {shown(given)}; choose from {', '.join(known)}")


def _check_uploading(config: TrainingArguments) -> None:
    """InputError if the hub does not know who uploads, or refuses the name: the Trainer asks late."""
    if not config.push_to_hub:
        return
    try:
        if config.hub_model_id:
            validate_repo_id(config.hub_model_id)
        HfApi().whoami(token=config.hub_token)
    except (HFValidationError, OSError) as error:
        raise InputError(
            f"--push_to_hub: {_line(error)}. Log in with `hf auth login`, or leave it out"
        ) from error


def _check_trackers(config: TrainingArguments) -> None:
    """InputError for a tracker that is not installed."""
    if config.report_to in ("none", [], ["none"]):
        return
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        given = config.report_to if isinstance(config.report_to, str) else " ".join(config.report_to or ())
        raise InputError(f"--report_to {given}: {error}") from error


def _check_schedule(config: TrainingArguments) -> None:
    """InputError for a schedule of the learning rate that cannot be made with its settings."""
    schedule = _word(config.lr_scheduler_type)
    settings: Any = config.lr_scheduler_kwargs
    steps = {"num_warmup_steps": 1, "num_training_steps": 2}
    try:
        get_scheduler(schedule, torch.optim.SGD([_weight()]), **steps, scheduler_specific_kwargs=settings)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--lr_scheduler_type {schedule} with --lr_scheduler_kwargs {settings}: {_line(error)}"
        ) from error


def _check_optimizer(config: TrainingArguments) -> None:
    """InputError for an optimizer other than the default one that cannot be made with its settings."""
    if all(_is_default(config, name) for name in ("optim", "optim_args", "optim_target_modules")):
        return
    from transformers import Trainer  # takes a second

    if config.optim_target_modules and not _word(config.optim).startswith(("galore", "apollo")):
        raise InputError(
            f"--optim_target_modules is for optimizers such as galore_adamw, not for {_word(config.optim)}; "
            "leave it out"
        )
    given = config.optim_args
    where = f"--optim {_word(config.optim)}" + (f" --optim_args {shown(given)}" if given else "")
    try:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(config)
        config.optim_args = None
        without = Trainer.get_optimizer_cls_and_kwargs(config)[1]
        made([_weight()], **settings)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"{where}: {_line(error)}") from error
    finally:
        config.optim_args = given
    if given and settings == without:
        raise InputError(f"{where}: this optimizer takes no --optim_args; leave them out")


def _word(choice: Any) -> str:
    return str(getattr(choice, "value", choice))  # of an enumeration


def _weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 2))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
