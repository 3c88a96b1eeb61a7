"""LoRA on a model, and the reference: the same module with its adapters off.

The reference costs no second copy of the weights and starts exactly equal to the policy: the first loss of
DPO is ln 2 to the last digit, in every precision. When training starts from a trained adapter (SFT, then
DPO), that adapter stays beside the trained one, frozen, under the name `reference`, and the reference is the
model with it: what was trained before is part of what the policy is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

POLICY, REFERENCE = "default", "reference"  # names of adapters


@dataclass
class LoraArguments:
    """The LoRA flags, under trl's names."""

    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter; --no_use_peft trains all weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha: the update is scaled by alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the LoRA input, in the policy only."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get an adapter (default: the attention projections)."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) (arXiv 2312.03732)."})
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained adapter to start from, with its own rank, alpha, dropout and layers; "
            "it becomes the reference, too."
        },
    )


def lora_config(arguments: LoraArguments, default_targets: list[str] | str, **kwargs) -> LoraConfig:
    """The peft configuration of the flags; `default_targets` where the flags name no layers."""
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


@contextmanager
def reference(model: nn.Module) -> Iterator[nn.Module]:
    """The model as its own reference: adapters off (or the one it started from on), without dropout.

    Everything is put back on leaving, after an error too: which adapter is active, what requires a gradient,
    which modules are in training mode. A model without adapters is a ValueError: it needs a frozen copy.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            "this model has no adapters to switch off: give the trainer a frozen copy as reference_model"
        )
    training = [module for module in model.modules() if module.training]
    requires_grad = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    active = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            if any(REFERENCE in getattr(layer, name) for name in layer.adapter_layer_names):
                layer.set_adapter([REFERENCE])
            else:
                layer.enable_adapters(False)
        yield model
    finally:
        for layer, names, disabled in active:
            layer.set_adapter(names)
            layer.enable_adapters(not disabled)
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
        for module in training:
            module.training = True
