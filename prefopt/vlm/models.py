"""Vision-language models: loading them with their processor, 4-bit weights, LoRA.

Both are for the language model alone: vision tower, projector and language head are neither quantised nor
adapted.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from prefopt.adapters import (
    ADAPTER_FILE,
    ANEW,
    CONFIG_FILE,
    POLICY,
    REFERENCE,
    adapter_folder,
    check_base_unchanged,
    check_scalings,
    difference_of_adapter,
    lora_config,
)
from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.files import read_object
from prefopt.loading import UNUSABLE, check_finite, first_line, load_complete, load_part, not_loaded
from prefopt.options import check_name

VLM = "vision-language model"


def four_bits(
    dtype: torch.dtype, quant_type: str = "nf4", *, double_quantization: bool = True
) -> BitsAndBytesConfig:
    """QLoRA's 4-bit weights, arXiv 2305.14314, in layers that compute in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quantization,
    )


def load_vlm(
    model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model that answers in text about images, and its processor, from a folder or a hub id.

    `quantization` is for the linear layers of the language model; everything else has `dtype`. Only
    safetensors and no code from the repository; what cannot be loaded so is an InputError.
    """
    name, trusted = model_name_or_path, {"trust_remote_code": False}
    processor = load_part(AutoProcessor, name, VLM, revision, **trusted)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **trusted}
    if quantization is not None:
        options["quantization_config"] = _on_the_language_model(quantization, name, revision)
        options["device_map"] = {"": PartialState().device}  # quantised where it is used, and not moved later
    model = load_complete(AutoModelForImageTextToText, name, VLM, revision, **options)
    if getattr(model, "is_loaded_in_4bit", False):
        _check_4bit_layers(model, name)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise InputError(f"{name} has a {type(processor).__name__}, which reads no images")
    if processor.chat_template is None:
        raise InputError(f"the processor of {name} has no chat template; add a chat_template.jinja")
    return model, processor


def language_model_name(model: nn.Module) -> str:
    """The dotted name of the language model inside of a model, such as `model.language_model`."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    tower = model.get_encoder(modality="image") if isinstance(model, PreTrainedModel) else model
    name = next(name for name, module in model.named_modules() if module is decoder)
    if not name or any(module is tower for module in decoder.modules()):
        raise InputError(
            f"{type(model).__name__} does not tell its language model apart: it can only be trained as a "
            "whole, with --no_use_peft and without --load_in_4bit"
        )
    return name


def _on_the_language_model(
    quantization: BitsAndBytesConfig, name: str, revision: str | None
) -> BitsAndBytesConfig:
    """The quantisation with all modules skipped that are not the language model's.

    By default transformers would skip the language head alone and quantise the vision tower. InputError if
    the model on disk is quantised already.
    """
    config = load_part(AutoConfig, name, VLM, revision, trust_remote_code=False)
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise InputError(
            f"{name} is quantised already ({method}); leave out --load_in_4bit, or name the model that it "
            "was made from"
        )
    try:
        with torch.device("meta"):  # names alone, no weights
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except UNUSABLE as error:
        raise not_loaded(VLM, name, error) from error
    quantization = copy.copy(quantization)
    skipped = quantization.llm_int8_skip_modules or []
    quantization.llm_int8_skip_modules = [*skipped, *_beside(model, language_model_name(model))]
    return quantization


def _beside(model: nn.Module, inside: str) -> list[str]:
    """The names of the largest modules that neither contain the module `inside` nor belong to it."""
    path = inside.split(".")
    around = {".".join(path[:depth]) for depth in range(len(path))}
    return [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[0] in around and name not in {*around, inside}
    ]


def _check_4bit_layers(model: nn.Module, name: str) -> None:
    """Keep a forward pass from changing 4-bit layers; InputError for one that a CPU would read wrongly."""
    from bitsandbytes.nn import Linear4bit

    for layer_name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        weight: Any = layer.weight
        block = weight.quant_state.blocksize
        if weight.device.type == "cpu" and layer.in_features % block:
            raise InputError(
                f"{name}: bitsandbytes on a CPU reads 4-bit weights wrongly unless a layer has a multiple of "
                f"{block} inputs, and {layer_name} has {layer.in_features}; use a GPU, or no 4 bits"
            )
        # On a CPU with AVX512-BF16, a forward without gradient would repack the weights, round their
        # constants to bfloat16, and from then on no gradient would pass the layer.
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:  # the first forward would cast it
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def add_lora(model: PreTrainedModel, arguments: LoraArguments) -> PeftModel:
    """The model with a fresh LoRA adapter on its language model; never on vision tower and projector.

    The layers are those of `--lora_target_modules`, by default every linear one; if none is found, an
    InputError.
    """
    outside = rf"(?!{re.escape(language_model_name(model))}\.).*"
    config = lora_config(arguments, "all-linear", exclude_modules=outside, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config, adapter_name=POLICY)
    except ValueError as error:  # peft says which names it looked for
        raise InputError(f"--lora_target_modules {arguments.lora_target_modules}: {error}") from error


def start_from_lora(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The model with a trained adapter to continue from, and a frozen copy of it as the reference.

    `adapter` is a folder or a hub id, in peft's format. One of another model, or with layers outside of the
    language model, is an InputError.
    """
    folder = adapter_folder(adapter)
    unfit = f"the adapter {adapter} does not fit the {type(model).__name__} {model.name_or_path}"
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except UNUSABLE as error:
        raise InputError(f"{unfit}: its {CONFIG_FILE} cannot be read ({first_line(error)})") from error
    if not isinstance(base, str | None):
        raise InputError(f"{unfit}: base_model_name_or_path in its {CONFIG_FILE} is {base}, no name")
    if base:
        check_name(base, f"{unfit}: base_model_name_or_path in its {CONFIG_FILE}")
    check_base_unchanged(read_object(Path(folder, CONFIG_FILE), ANEW), f"the adapter {adapter}")
    check_finite(load_file(Path(folder, ADAPTER_FILE)), f"the adapter {adapter}", ANEW)
    if base and model.name_or_path and not _can_be_same(base, model.name_or_path):
        raise InputError(
            f"{unfit}: it was trained on {base}. Name that model; or, if it is the same one under another "
            f"name, change base_model_name_or_path in {folder}/{CONFIG_FILE}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on missing names, which are an error below
            policy = PeftModel.from_pretrained(model, folder, adapter_name=POLICY, is_trainable=True)
        policy.load_adapter(folder, REFERENCE)
    except UNUSABLE as error:
        raise InputError(f"{unfit}: {first_line(error)}") from error
    if difference := difference_of_adapter(policy, Path(folder, ADAPTER_FILE)):
        raise InputError(
            f"{unfit}: {difference}. If it was trained on this model, its file is damaged: copy or train it "
            "again"
        )
    check_scalings(policy, POLICY, adapter)
    if outside := _adapted_outside(policy.get_base_model()):
        raise InputError(
            f"the adapter {adapter} has {len(outside)} layers outside of the language model, {outside[0]} "
            "among them, where nothing is trained here; merge it into the model and train on that"
        )
    return policy


def check_saved_adapter(
    model: PeftModel, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Read a saved adapter back; a RuntimeError unless it holds all of the model's factors, bit for bit.

    `state` are the gathered weights of a model that its processes share.
    """
    file = Path(folder, ADAPTER_FILE)
    if difference := difference_of_adapter(model, file, state):
        raise RuntimeError(f"{file} is not the adapter that was trained: {difference}")


def _can_be_same(one: str, other: str) -> bool:
    """Whether two folders or hub ids can be of one model; one that was moved keeps its last name."""
    if Path(one).exists() and Path(other).exists():
        return Path(one).samefile(other)
    return Path(one).name == Path(other).name


def _adapted_outside(model: nn.Module) -> list[str]:
    """The layers with adapters that are not the language model's."""
    inside = f"{language_model_name(model)}."
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [name for name in adapted if not name.startswith(inside)]
