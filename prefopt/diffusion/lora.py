"""LoRA on a diffusion model's network: fresh or trained ones, and the files that diffusers reads."""

import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.adapters import (
    ANEW,
    POLICY,
    REFERENCE,
    adapter_layers,
    apply_options,
    check_base_unchanged,
    check_scalings,
    header_configs,
    lora_config,
)
from prefopt.config import LoraArguments
from prefopt.diffusion.generator import adapter_file
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE
from prefopt.loading import UNUSABLE, check_finite

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LOADED = "sampled"  # the name under which a pipeline holds an adapter to sample with

# One of these is in the name of each pair's first factor, and in the second's what stands beside it.
_FACTORS = {
    "lora_A.": "lora_B.",
    "lora_down.": "lora_up.",
    "lora.down.": "lora.up.",
    "lora_linear_layer.down.": "lora_linear_layer.up.",
}


# Adapters to train


def make_trainable(network: Any, pipeline: Any, options: LoraArguments, targets: Sequence[str]) -> None:
    """Give the network the adapter of the options: a fresh one, a trained one, or none: all weights train."""
    if options.adapter_name_or_path:
        start_from_lora(network, pipeline, options.adapter_name_or_path)
        apply_options(options, network)
    elif options.use_peft:
        add_lora(network, lora_config(options, list(targets)))
    else:
        network.requires_grad_(True)


def start_from_lora(network: Any, pipeline: Any, adapter: str) -> None:
    """Continue training an adapter, its frozen copy the reference; one that does not fit is an InputError."""
    network.requires_grad_(False)
    file = adapter_file(adapter)
    with warnings.catch_warnings(), _in_float32(network):
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # two are meant
        for name in (REFERENCE, POLICY):
            load_adapter(pipeline, file, name)
    for name, part in pipeline.components.items():
        if part is not network and isinstance(part, nn.Module) and adapter_layers(part):
            raise InputError(f"the adapter {adapter} changes the {name}, too; only the denoiser's is trained")
    network.set_adapter(POLICY)
    for layer in adapter_layers(network):
        layer.set_adapter(POLICY)  # which also freezes the other one


@contextmanager
def _in_float32(network: nn.Module) -> Iterator[None]:
    """Within, the network's weights are float32; afterwards they are what they were, what was added is not.

    An adapter is loaded in the precision of its layer, which would round it.
    """
    weights = [(parameter, parameter.dtype) for parameter in network.parameters()]
    try:
        for parameter, _ in weights:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in weights:
            parameter.data = parameter.data.to(dtype)


def add_lora(network: Any, config: LoraConfig) -> None:
    """A fresh float32 LoRA on the frozen network; no layer by these names is an InputError."""
    network.requires_grad_(False)
    try:
        network.add_adapter(config, adapter_name=POLICY)
    except ValueError as error:  # peft says which names it looked for
        raise InputError(f"--lora_target_modules {config.target_modules}: {error}") from error
    _upcast_trained(network)


def _upcast_trained(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# Files


def save_weights(
    network: Any, component: str, folder: str | Path, state_dict: Mapping[str, Tensor], *, fold: bool = False
) -> None:
    """Write the network's LoRA, or, if it has none, all of its weights with its config in `component`/.

    With `fold` the LoRA's scaling, alpha / r or alpha / sqrt(r), is multiplied into each second factor, and
    the metadata say alpha = r. Programs that know no metadata take alpha = r, too: so all compute the same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name.removeprefix(f"{component}."): value for name, value in state_dict.items()}
    layers = len(adapter_layers(network))
    if not layers:
        network.save_config(folder / component)
        whole = {name: value.contiguous() for name, value in state.items()}
        save_file(whole, folder / component / WEIGHTS_FILE, {"format": "pt"})
        return
    factors = get_peft_model_state_dict(network, state_dict=dict(state), adapter_name=POLICY)
    config = network.peft_config[POLICY].to_dict()
    if fold:
        factors |= _scaled(network, factors)
        config |= {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    # The only entry: safetensors writes several in an order of chance, and equal runs differ.
    metadata = {f"{component}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file(
        {f"{component}.{name}": factor.contiguous() for name, factor in factors.items()},
        folder / ADAPTER_FILE,
        {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True, default=str)},
    )
    written = load_file(folder / ADAPTER_FILE)
    if len(written) != 2 * layers:
        raise RuntimeError(f"{folder / ADAPTER_FILE} holds {len(written)} tensors for {layers} layers")


def _scaled(network: Any, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second factor of each layer, times the layer's scaling."""
    scaled, layers = {}, set(adapter_layers(network))
    for name, module in network.named_modules():
        if module in layers and module.scaling[POLICY] != 1:
            second = f"{name.replace('_checkpoint_wrapped_module.', '')}.lora_B.weight"
            scaled[second] = factors[second] * module.scaling[POLICY]
    return scaled


def load_weights(network: Any, component: str, folder: str | Path) -> None:
    """Load what `save_weights` wrote, bit for bit; what does not fit is an InputError."""
    layers = len(adapter_layers(network))
    file = Path(folder, ADAPTER_FILE) if layers else Path(folder, component, WEIGHTS_FILE)
    try:
        state = {name.removeprefix(f"{component}."): value for name, value in load_file(file).items()}
        if not layers:
            network.load_state_dict(state)
            return
        unknown = set_peft_model_state_dict(network, state, adapter_name=POLICY).unexpected_keys
    except (OSError, SafetensorError, RuntimeError) as error:  # the last of another shape
        raise InputError(f"{file} does not fit this model: {error}") from error
    if unknown or len(state) != 2 * layers:
        raise InputError(f"{file} does not fit this model: {len(state)} tensors for {layers} layers")


# Adapters of a pipeline


def load_adapter(pipeline: Any, file: Path, name: str = LOADED) -> None:
    """Load a LoRA file; InputError unless every pair of its factors finds its layer."""
    model = pipeline.name_or_path
    for config in header_configs(file, f"the adapter {file}").values():
        check_base_unchanged(config, f"the adapter {file}")
    tensors = load_file(file)
    check_finite(tensors, f"the adapter {file}", ANEW)
    expected = _count_pairs(tensors, file)
    # diffusers warns for each component that an adapter leaves alone, and prints what it then raises: what
    # matters is counted or raised below.
    log = logging.getLogger("diffusers.loaders")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        pipeline.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
        )
    except UNUSABLE as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise InputError(f"the adapter {file} does not fit the model {model}: {reason}") from error
    finally:
        log.setLevel(level)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    found = sum(f"lora_A.{name}." in key for module in modules for key, _ in module.named_parameters())
    if expected == 0 or found < expected:
        raise InputError(
            f"the adapter {file} does not fit the model {model}: of its {expected} pairs of LoRA factors, "
            f"the model has layers for {found}"
        )
    for module in modules:
        check_scalings(module, name, file)


def _count_pairs(names: Collection[str], file: Path) -> int:
    """How many pairs of factors there are; InputError for a factor without its partner."""
    count = 0
    for first, second in _FACTORS.items():
        partners = {key: key.replace(first, second) for key in names if first in key}
        partners |= {key: key.replace(second, first) for key in names if second in key}
        if alone := sorted(key for key, partner in partners.items() if partner not in names):
            raise InputError(
                f"the adapter {file} has {alone[0]} without its partner {partners[alone[0]]}. {ANEW}"
            )
        count += len(partners) // 2
    return count


def set_adapter_scale(pipeline: Any, scale: float) -> None:
    """Weigh the loaded adapter; at 0 its layers are switched off, so that the base answers bit for bit."""
    if scale == 0:
        pipeline.disable_lora()
    else:
        pipeline.enable_lora()
        pipeline.set_adapters([LOADED], adapter_weights=[scale])
