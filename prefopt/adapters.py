"""LoRA on a model: its configuration from the options, its layers, the names and folders of its adapters.

When training starts from a trained adapter (SFT, then DPO), that adapter stays beside the trained one,
frozen, under the name `reference`: what was trained before is part of what the policy is compared with.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from prefopt.config import LORA, LoraArguments
from prefopt.errors import InputError
from prefopt.loading import UNUSABLE, first_line

POLICY, REFERENCE = "default", "reference"  # names of adapters
CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # in peft's format


def lora_config(arguments: LoraArguments, default_targets: list[str] | str, **kwargs: Any) -> LoraConfig:
    """The peft configuration of a fresh adapter; `default_targets` where the options name no layers."""
    own: dict[str, Any] = {name: getattr(arguments, name) for name in LORA}
    targets = arguments.lora_target_modules or default_targets
    return LoraConfig(r=own.pop("lora_r"), target_modules=targets, **own, **kwargs)


def check_own_options(arguments: LoraArguments, model: nn.Module, config: LoraConfig) -> None:
    """InputError for an option that says otherwise than the adapter that the model starts from."""
    own = {"lora_r": config.r, **{name: getattr(config, name) for name in LORA if name != "lora_r"}}
    differing = {name: has for name, has in own.items() if getattr(arguments, name) not in (None, has)}
    if names := arguments.lora_target_modules:
        layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        if {layer.rpartition(".")[2] for layer in layers} != {name.rpartition(".")[2] for name in names}:
            differing["lora_target_modules"] = f"{len(layers)} others, such as {layers[0]}"
    for name, has in differing.items():
        raise InputError(
            f"--{name} is {getattr(arguments, name)}, and the adapter {arguments.adapter_name_or_path} has "
            f"{has}, which training does not change: leave the option out"
        )


def adapter_layers(model: nn.Module) -> list[Any]:
    """Every layer of the model that carries adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter in peft's format: the folder named, or the download of a hub id.

    Pickled weights are never downloaded; a folder without the two files is an InputError.
    """
    folder = adapter
    if not Path(adapter).exists():
        try:
            folder = snapshot_download(adapter, allow_patterns=[CONFIG_FILE, ADAPTER_FILE])
        except UNUSABLE as error:
            raise InputError(
                f"no adapter {adapter!r}: no such folder here, and as a hub id it could not be loaded "
                f"({first_line(error)})"
            ) from error
    missing = [name for name in (CONFIG_FILE, ADAPTER_FILE) if not Path(folder, name).is_file()]
    if missing:
        raise InputError(f"{adapter} is no adapter in peft's format: it has no {' and no '.join(missing)}")
    return folder
