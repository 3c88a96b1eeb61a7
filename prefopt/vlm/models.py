"""Vision-language models: loading them with their processor, and LoRA on the language model alone."""

import re
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from prefopt.adapters import POLICY, REFERENCE, lora_config
from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.loading import UNUSABLE, first_line, load_complete, load_part

ADAPTER_FILE = "adapter_model.safetensors"
VLM = "vision-language model"


def load_vlm(
    model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model that answers in text about images, and its processor, from a folder or a hub id.

    Only safetensors and no code from the repository; what cannot be loaded so is an InputError.
    """
    name, trusted = model_name_or_path, {"trust_remote_code": False}
    processor = load_part(AutoProcessor, name, VLM, revision, **trusted)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **trusted}
    model = load_complete(AutoModelForImageTextToText, name, VLM, revision, **options)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise InputError(f"{name} has a {type(processor).__name__}, which reads no images")
    if processor.chat_template is None:
        raise InputError(f"the processor of {name} has no chat template; add a chat_template.jinja")
    return model, processor


def language_model_name(model: nn.Module) -> str:
    """The dotted name of the language model inside of a model, such as `model.language_model`."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    name = next(name for name, module in model.named_modules() if module is decoder)
    if not name:
        raise InputError(
            f"{type(model).__name__} does not tell its language model apart; train it with --no_use_peft"
        )
    return name


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

    `adapter` is a folder or a hub id, in peft's format; one that does not fit the model is an InputError.
    """
    folder = _adapter_folder(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on missing names, which are an error below
            policy = PeftModel.from_pretrained(model, folder, adapter_name=POLICY, is_trainable=True)
        policy.load_adapter(folder, REFERENCE)
    except UNUSABLE as error:
        raise InputError(
            f"the adapter {adapter} does not fit {type(model).__name__}: {first_line(error)}"
        ) from error
    if difference := _difference(policy, Path(folder, ADAPTER_FILE)):
        raise InputError(f"the adapter {adapter} does not fit {type(model).__name__}: {difference}")
    return policy


def check_saved_adapter(model: PeftModel, folder: str | Path) -> None:
    """Read a saved adapter back; a RuntimeError unless it holds all of the model's factors, bit for bit."""
    file = Path(folder, ADAPTER_FILE)
    if difference := _difference(model, file):
        raise RuntimeError(f"{file} is not the adapter that was trained: {difference}")


def _difference(model: PeftModel, file: Path) -> str:
    """What tells the policy's adapter from a file, or nothing."""
    written = load_file(file)
    state = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    if not written:
        return "the file holds no tensors"
    if missing := sorted(set(state) ^ set(written)):
        where = "file" if missing[0] in state else "model"
        return f"{len(missing)} names are on one side only; {missing[0]} is missing in the {where}"
    changed = [
        name for name, value in state.items() if not torch.equal(value.cpu(), written[name].to(value.dtype))
    ]
    return f"{len(changed)} tensors differ, {changed[0]} among them" if changed else ""


def _adapter_folder(adapter: str) -> str:
    """The adapter's folder, fetched from the hub if it is none here; pickled weights are never asked for."""
    folder = adapter
    if not Path(adapter).exists():
        try:
            folder = snapshot_download(adapter, allow_patterns=["adapter_config.json", ADAPTER_FILE])
        except UNUSABLE as error:
            raise InputError(
                f"no adapter {adapter!r}: no such folder here, and as a hub id it could not be loaded "
                f"({first_line(error)})"
            ) from error
    missing = [name for name in ("adapter_config.json", ADAPTER_FILE) if not Path(folder, name).is_file()]
    if missing:
        raise InputError(f"{adapter} is no adapter in peft's format: it has no {' and no '.join(missing)}")
    return folder
