"""LoRA on a model: its configuration from the options, its layers, the names of its adapters.

When training starts from a trained adapter (SFT, then DPO), that adapter stays beside the trained one,
frozen, under the name `reference`: what was trained before is part of what the policy is compared with.
"""

from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from prefopt.config import LoraArguments

POLICY, REFERENCE = "default", "reference"  # names of adapters


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
