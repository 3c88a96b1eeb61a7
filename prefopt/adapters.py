"""LoRA on a model: its configuration from the options, its layers, the names and folders of its adapters.

When training starts from a trained adapter (SFT, then DPO), that adapter stays beside the trained one,
frozen, under the name `reference`: what was trained before is part of what the policy is compared with.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from prefopt.config import LORA, LoraArguments
from prefopt.errors import InputError
from prefopt.files import open_tensors, read_object
from prefopt.hub import adapter_place

POLICY, REFERENCE = "default", "reference"  # names of adapters
CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # in peft's format
ANEW = "Save or download the adapter again, or name another one"  # what to do about a damaged one
# Other initialisations take what they put into the factors out of the base weights.
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")


def lora_config(arguments: LoraArguments, default_targets: list[str] | str, **kwargs: Any) -> LoraConfig:
    """The peft configuration of a fresh adapter; `default_targets` where the options name no layers."""
    own: dict[str, Any] = {name: getattr(arguments, name) for name in LORA}
    targets = arguments.lora_target_modules or default_targets
    return LoraConfig(r=own.pop("lora_r"), target_modules=targets, **own, **kwargs)


def apply_options(arguments: LoraArguments, model: Any) -> None:
    """Apply the options to the trained adapter that the model starts from, and to its frozen copy.

    Another alpha, or rsLoRA, leaves the adapter's update as it is: the second factors are divided by what the
    scaling is multiplied with, so only the steps of training change. Adapters of diffusion models are saved
    with alpha = r and the scaling in their factors; trained on with the options that they were trained
    with, they have their former factors again. Any other option that says otherwise than the adapter is an
    InputError.
    """
    config = model.peft_config[POLICY]
    alpha = config.lora_alpha if arguments.lora_alpha is None else arguments.lora_alpha
    rslora = config.use_rslora if arguments.use_rslora is None else arguments.use_rslora
    if (alpha, rslora) != (config.lora_alpha, config.use_rslora):
        for name in (POLICY, REFERENCE):  # both, so that they stay equal to the last bit
            _rescale(model, name, alpha, rslora)
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


def _rescale(model: Any, name: str, alpha: int, rslora: bool) -> None:
    """Give an adapter another scaling, its second factors divided by the change."""
    for layer in adapter_layers(model):
        scaling = alpha / (math.sqrt(layer.r[name]) if rslora else layer.r[name])
        change = layer.scaling[name] / scaling
        if name in layer.lora_B:
            for parameter in layer.lora_B[name].parameters():  # the bias, too, if there is one
                parameter.data.mul_(change)
        else:
            layer.lora_embedding_B[name].data.mul_(change)
        layer.scaling[name], layer.lora_alpha[name] = scaling, alpha
    config = model.peft_config[name]
    config.lora_alpha, config.use_rslora, config.alpha_pattern = alpha, rslora, {}


def adapter_layers(model: nn.Module) -> list[Any]:
    """Every layer of the model that carries adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def reference_scales(model: nn.Module) -> dict[str, float]:
    """What the update of each layer's reference adapter is multiplied with; empty without such an adapter."""
    named: Any = model.named_modules()
    layers: list[Any] = [(name, module) for name, module in named if isinstance(module, BaseTunerLayer)]
    return {name: layer.scaling[REFERENCE] for name, layer in layers if REFERENCE in layer.scaling}


def check_scalings(model: nn.Module, name: str, adapter: object) -> None:
    """InputError unless the loaded adapter `name` has a scaling in each layer that leaves an update."""
    for layer in adapter_layers(model):
        scaling = layer.scaling.get(name, 1.0)
        if not 0 < scaling < math.inf:
            raise InputError(f"the adapter {adapter} multiplies its update by {scaling}: see its lora_alpha")


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter in peft's format: the folder named, or the download of a hub id.

    Pickled weights are never downloaded; a folder without the two files, or with damaged ones, is an
    InputError.
    """
    folder = adapter_place(adapter, CONFIG_FILE, ADAPTER_FILE)
    missing = [name for name in (CONFIG_FILE, ADAPTER_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{adapter} is no adapter in peft's format: it has no {' and no '.join(missing)}")
    read_object(folder / CONFIG_FILE, ANEW)
    open_tensors(folder / ADAPTER_FILE, ANEW)
    return str(folder)


def header_configs(file: Path, name: str) -> dict[str, dict[str, Any]]:
    """The configs in the header of a file that diffusers loads, by component."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY  # a folder of peft's needs no diffusers

    header = open_tensors(file, ANEW).metadata() or {}
    if "alpha" in header:
        raise InputError(f"{name} has an alpha in its header, which not every pipeline reads; save it anew")
    configs: dict[str, dict[str, Any]] = {}
    text = header.get(LORA_ADAPTER_METADATA_KEY, "{}")
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the config in the header of {name} is no JSON: {error}. {ANEW}") from error
    if not isinstance(options, dict):
        raise InputError(f"the config in the header of {name} is {text[:40]!r}, not an object. {ANEW}")
    for key, value in options.items():
        part, _, option = key.partition(".")
        configs.setdefault(f"{part}.", {})[option] = value
    return configs


def check_base_unchanged(config: Mapping[str, Any], name: str) -> None:
    """InputError for an adapter whose loading would change the weights that it is put on."""
    start = config.get("init_lora_weights", True)
    if start not in _BASE_UNCHANGED:
        raise InputError(
            f"{name} is no plain LoRA: it was initialised by {start}, which may change the base weights. "
            "Save it as a plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def difference_of_adapter(model: PeftModel, file: Path, weights: Mapping[str, Tensor] | None = None) -> str:
    """What tells the policy's adapter from a file, or nothing.

    `weights` are the gathered ones of a model that its processes share.
    """
    written = load_file(file)
    gathered: Any = None if weights is None else dict(weights)
    state = get_peft_model_state_dict(model, gathered, adapter_name=POLICY, save_embedding_layers=False)
    if not written:
        return "the file holds no tensors"
    if missing := sorted(set(state) ^ set(written)):
        where = "file" if missing[0] in state else "model"
        return f"{len(missing)} names are on one side only; {missing[0]} is missing in the {where}"
    changed = [
        name for name, value in state.items() if not torch.equal(value.cpu(), written[name].to(value.dtype))
    ]
    return f"{len(changed)} tensors differ, {changed[0]} among them" if changed else ""
