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

from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.loading import UNUSABLE, first_line

POLICY, REFERENCE = "default", "reference"  # names of adapters
CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # in peft's format


def lora_config(arguments: LoraArguments, default_targets: list[str] | str, **kwargs: Any) -> LoraConfig:
    """The peft configuration of the options; `default_targets` where they name no layers."""
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or default_targets,
        use_rslora=arguments.use_rslora,
        **kwargs,
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
