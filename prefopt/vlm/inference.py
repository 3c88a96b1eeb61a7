"""A trained adapter on a vision-language model that only answers: nothing is trained, nothing is merged."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prefopt.adapters import ADAPTER_FILE, CONFIG_FILE, REFERENCE, adapter_folder
from prefopt.files import files_key
from prefopt.vlm.models import start_from_lora


def with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with a LoRA in its layers, frozen: a folder or a hub id in peft's format.

    One of another model is an InputError.
    """
    policy = start_from_lora(model, adapter)
    policy.delete_adapter(REFERENCE)
    adapted: Any = policy.get_base_model()
    return adapted.requires_grad_(False)


def adapter_identity(adapter: str) -> str:
    """The SHA-256 over an adapter's weights and configuration, wherever they lie."""
    folder = Path(adapter_folder(adapter))
    return files_key(folder, [folder / CONFIG_FILE, folder / ADAPTER_FILE])
