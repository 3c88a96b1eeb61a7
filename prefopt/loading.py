"""Models by name: safetensors only, every weight there, known by their files before they are loaded."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

import transformers
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError
from safetensors import SafetensorError
from torch import nn

from prefopt.errors import InputError
from prefopt.files import files_key, used_variant

Model = TypeVar("Model")

# What transformers, diffusers, peft and the hub's client raise for a wrong name or a broken file.
UNUSABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    RevisionResolutionError,
)
_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")  # that a model's answers may depend on


@dataclass(frozen=True)
class Lazy(Generic[Model]):
    """A model that is loaded when it is first needed; `identity` tells it from others before that."""

    identity: str
    load: Callable[[], Model]


def load_complete(kind: Any, name: str | Path, what: str, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained(name)`; InputError unless the weights are safetensors and none is missing.

    transformers fills in at random what a file lacks, with no more than a warning. `what` the model should
    be, for the message; `options` go to `from_pretrained`.
    """
    try:
        with quiet_loading():
            model, info = kind.from_pretrained(
                name, revision=revision or "main", use_safetensors=True, output_loading_info=True, **options
            )
    except UNUSABLE as error:
        raise not_loaded(what, name, error) from error
    lacking = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if lacking:
        raise InputError(
            f"no {what} could be loaded from {str(name)!r}: its weights lack {len(lacking)} tensors of a "
            f"{type(model).__name__}, {lacking[0]} among them; name another model"
        )
    return model


def load_part(kind: Any, name: str | Path, what: str, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained(name)` of a tokenizer or processor; what cannot be loaded is an InputError."""
    try:
        return kind.from_pretrained(name, revision=revision or "main", **options)
    except UNUSABLE as error:
        raise not_loaded(what, name, error) from error


def load_parts(
    index: Mapping[str, Any], folder: Path, dtype: Any, variant: str | None = None
) -> dict[str, Any]:
    """The models that a pipeline's index names, each complete; the safety checker is left out.

    A part without weights of the `variant` has its plain ones loaded, as diffusers does.
    """
    models = {}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list | tuple) else (None, None)
        module = import_module(library) if library in ("diffusers", "transformers") else None
        part = getattr(module, str(kind), None) if module and name != "safety_checker" else None
        if isinstance(part, type) and issubclass(part, nn.Module):
            options = {"subfolder": name, "dtype": dtype, "variant": used_variant(folder / name, variant)}
            models[name] = load_complete(part, folder, f"pipeline's {name}", **options)
    return models


def not_loaded(what: str, name: str | Path, error: Exception) -> InputError:
    """The error for a model, or what belongs to it, that could not be loaded."""
    return InputError(
        f"no {what} could be loaded from {str(name)!r}: {first_line(error)} "
        "Name a folder that save_pretrained wrote, or a hub id"
    )


def files_identity(name: str | Path, revision: str | None = None) -> str:
    """What a model's files hold, without loading it: SHA-256 over a folder's, or the commit of a hub id."""
    folder = Path(name)
    if folder.is_dir():
        return files_key(folder, sorted(path for path in folder.iterdir() if path.suffix in _FILES))
    try:
        return f"{name} at {resolve_revision(str(name), revision=revision).resolved}"
    except UNUSABLE as error:
        raise not_loaded("model", name, error) from error


def own_memory(module: nn.Module) -> nn.Module:
    """The module with its weights copied to memory that torch allocates.

    Weights just loaded may be views into the mapped file, at any address, or copies, as under
    torch.distributed; and on CPUs the last bit of a product depends on its factors' alignment.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def first_line(error: Exception) -> str:
    """The beginning of an error's message."""
    return str(error).strip().split("\n")[0][:300]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars for seconds of loading, and no table of what a file lacks: that is an error here."""
    transformers.utils.logging.disable_progress_bar()
    log = logging.getLogger("transformers.modeling_utils")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log.addFilter(is_error)  # a higher level of this logger would start a check that logs more
    try:
        yield
    finally:
        log.removeFilter(is_error)
