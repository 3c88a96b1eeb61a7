"""FSDP and DeepSpeed, which split a model among the processes of a run: what they are told, and refused."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import strtobool

from prefopt.errors import InputError

EXAMPLE = "as in recipes/configs/accelerate/fsdp2.yaml"


def check_fsdp(settings: Any, *, use_cpu: bool) -> None:
    """InputError for FSDP that would be wrong or in vain; `settings` of --fsdp_config, or a launcher's."""
    if settings is None:
        names = {"version": "FSDP_VERSION", "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING"}
        settings = {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}
        settings = {"version": "1", **settings}
    if int(settings.get("version", 2)) != 2:
        raise InputError(f"FSDP 1 is not supported; set fsdp_version: 2, {EXAMPLE}")
    if strtobool(str(settings.get("cpu_ram_efficient_loading", False))):
        raise InputError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without the weights that a "
            f"reference is made of; set it to false, {EXAMPLE}"
        )
    if use_cpu:
        raise InputError(
            "FSDP: accelerate splits a model over GPUs, and there are none: each process would have it all "
            "and not say so. Leave FSDP out, or run where there are GPUs"
        )


def prepare_fsdp(plugin: Any, model: nn.Module) -> None:
    """Tell accelerate's plugin of a model's blocks, and to leave precision to autocast as DDP does.

    Its own mixed precision would cast timesteps, noise and scores to 16 bits, not the networks' layers alone.
    """
    plugin.mixed_precision_policy = None
    if plugin.transformer_cls_names_to_wrap is None:
        # Libraries name blocks of all their models; those that are not in this one would be an error.
        there = {type(module).__name__ for module in model.modules()}
        names = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in names if name in there]


def complete_states(optimizer: Any) -> None:
    """Give each parameter that had no gradient yet the state that it would begin with, which is all zeros.

    torch resumes no split optimizer that lacks one; a vision tower's last layer may never have a gradient.
    """
    known = next(((parameter, state) for parameter, state in optimizer.state.items() if state), None)
    if known is None:
        return
    example, values = known
    for parameter in (one for group in optimizer.param_groups for one in group["params"]):
        if parameter.requires_grad and not optimizer.state.get(parameter):
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == example.shape else value)
                for name, value in values.items()
            }


def load_whole_models() -> None:
    """Let each process load whole models: DeepSpeed splits the one that is trained when its training begins.

    Told of ZeRO-3, transformers would split every model that it loads, text encoders and references too.
    """
    unset_hf_deepspeed_config()


def check_sharding(checkpoint: str, sharding: str | None) -> None:
    """InputError for a checkpoint of a run whose weights were split among its processes in another way."""
    names = [path.name for path in Path(checkpoint).iterdir()]
    marks = {"FSDP": "pytorch_model_fsdp", "DeepSpeed": "global_step"}
    made = next((kind for kind, mark in marks.items() if any(name.startswith(mark) for name in names)), None)
    if made != sharding:
        raise InputError(
            f"{checkpoint} is of a run under {made or 'neither FSDP nor DeepSpeed'}, and this one is under "
            f"{sharding or 'neither'}: launch it as that one, or name another --output_dir"
        )
