"""Models by name: safetensors only, every weight there, known by their files before they are loaded."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import InputError
from prefopt.files import files_key, used_variant
from prefopt.model_files import CONFIG_FILE, MODEL_FILE, check_files, read_config
from prefopt.options import check_name, is_local_path

logger = logging.getLogger(__name__)

Model = TypeVar("Model")

# What transformers, diffusers, peft and the hub's client raise for a wrong name, a broken file, or values of
# a config that make no model.
UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    ImportError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    RevisionResolutionError,
    StrictDataclassError,
    re.error,  # names of layers are patterns
)
_ANEW = "save or download the pipeline again"
_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")  # that a model's answers may depend on


@dataclass(frozen=True)
class Lazy(Generic[Model]):
    """A model that is loaded when it is first needed; `identity` tells it from others before that."""

    identity: str
    load: Callable[[], Model]


def load_complete(kind: Any, name: str | Path, what: str, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained(name)`; InputError unless the weights are safetensors, all there and finite.

    transformers fills in at random what a file lacks, with no more than a warning. Tensors that the model
    does not have are not used, and a warning says so. `what` the model should be, for the message; `options`
    go to `from_pretrained`.
    """
    _check_source(name, what, options.get("subfolder", ""), has_config=True)
    if PreTrainedModel in kind.__mro__ or kind.__module__.startswith("transformers."):
        options["ignore_mismatched_sizes"] = True  # its error would not name them; the one below does
    try:
        with quiet_loading():
            model, info = kind.from_pretrained(
                name, revision=revision or "main", use_safetensors=True, output_loading_info=True, **options
            )
    except UNUSABLE as error:
        raise not_loaded(what, name, error) from error
    kind_name, where = type(model).__name__, f"no {what} could be loaded from {str(name)!r}"
    for key, found, expected in info["mismatched_keys"]:
        raise InputError(
            f"{where}: the tensor {key} is {tuple(found)} in its weights and {tuple(expected)} in the "
            f"{kind_name} that its {CONFIG_FILE} describes; name another model"
        )
    if lacking := sorted(info["missing_keys"]):
        raise InputError(
            f"{where}: its weights lack {len(lacking)} tensors of a {kind_name}, {lacking[0]} among them; "
            "name another model"
        )
    if unknown := sorted(info["unexpected_keys"]):
        logger.warning(
            "%s in %s: %d tensors are not used, for a %s has none such as %s",
            *(what, name, len(unknown), kind_name, unknown[0]),
        )
    check_finite(model.state_dict(), f"the {what} in {str(name)!r}")
    return model


def check_finite(
    tensors: Mapping[str, Tensor], what: str, remedy: str = "Name another model, or another dtype"
) -> None:
    """InputError, which ends with `remedy`, if a value is not finite; `what` the tensors are of."""
    for key, value in tensors.items():
        # The sum takes one pass and no memory. It may overflow where all values are finite.
        is_plain = value.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if not is_plain or value.is_meta or value.sum(dtype=torch.float32).isfinite():
            continue
        if not value.isfinite().all():
            raise InputError(
                f"{what} has values that are not finite in {value.dtype}, in the tensor {key}. {remedy}"
            )


def model_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """What the config.json of a folder or a hub id says; an InputError if there is none."""
    what = f"model with a {CONFIG_FILE}"
    _check_source(name, what, has_config=True)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    except UNUSABLE as error:
        raise not_loaded(what, name, error) from error
    return config


def _check_source(name: str | Path, what: str, subfolder: str = "", *, has_config: bool = False) -> None:
    """InputError for a name that is none, a path where nothing is, and a folder with damaged files."""
    check_name(name, f"the name of a {what}")
    if is_local_path(str(name)) and not Path(name).exists():
        raise not_loaded(what, name, FileNotFoundError("nothing is there"))
    folder = Path(name, subfolder)
    if folder.is_dir():
        check_files(folder)
        if has_config:
            read_config(folder)


def load_part(kind: Any, name: str | Path, what: str, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained(name)` of a tokenizer or processor; what cannot be loaded is an InputError."""
    _check_source(name, what, options.get("subfolder", ""))
    try:
        return kind.from_pretrained(name, revision=revision or "main", **options)
    except UNUSABLE as error:
        raise not_loaded(what, name, error) from error


def load_parts(
    index: Mapping[str, Any], folder: Path, dtype: Any, variant: str | None = None
) -> dict[str, Any]:
    """The models that a pipeline's index names, each complete; the safety checker is left out.

    A part without weights of the `variant` has its plain ones loaded, as diffusers does. InputError for parts
    that are no classes of diffusers or transformers: nothing else is imported because a file names it.
    """
    models = {}
    for name, entry in index.items():
        if name.startswith("_") or name == "safety_checker" or not isinstance(entry, list):
            continue  # what is no list is an argument of the pipeline
        part = _part(name, entry, folder)
        if part is None:
            continue
        if issubclass(part, nn.Module):
            options = {"subfolder": name, "dtype": dtype, "variant": used_variant(folder / name, variant)}
            models[name] = load_complete(part, folder, f"pipeline's {name}", **options)
        elif not (folder / name).is_dir():
            raise InputError(f"{folder} has no folder {name!r}, which its {MODEL_FILE} names; {_ANEW}")
        else:
            check_files(folder / name)
    return models


def _part(name: str, entry: list[Any], folder: Path) -> type | None:
    """The class of a pipeline's part; None for one that it does without."""
    if entry == [None, None]:
        return None
    library, kind = entry if len(entry) == 2 else (None, None)
    module = import_module(library) if library in ("diffusers", "transformers") else None
    part = getattr(module, kind, None) if module and isinstance(kind, str) else None
    if not isinstance(part, type) or not hasattr(part, "from_pretrained"):
        raise InputError(
            f"{folder / MODEL_FILE} says that {name!r} is {entry}, which is no class of diffusers or "
            f"transformers that is loaded from a folder; {_ANEW}"
        )
    return part


def not_loaded(what: str, name: str | Path, error: Exception) -> InputError:
    """The error for a model, or what belongs to it, that could not be loaded."""
    # After these words, diffusers gives advice that is about its own arguments.
    reason = first_line(error).partition(" If you want")[0] or type(error).__name__
    return InputError(
        f"no {what} could be loaded from {str(name)!r}: {reason.rstrip('.')}. "
        "Name a folder that save_pretrained wrote, or a hub id"
    )


def files_identity(name: str | Path, revision: str | None = None) -> str:
    """What a model's files hold, without loading it: SHA-256 over a folder's, or the commit of a hub id."""
    _check_source(name, "model")
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
    """The first line of an error's message, with the second one if that says what the first announces."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    first, *more = (line.strip() for line in text.strip().splitlines() or [""])
    return (f"{first} {more[0]}" if first.endswith(":") and more else first)[:300]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars for seconds of loading, and no table of what a file lacks: that is an error here."""
    transformers.utils.logging.disable_progress_bar()
    names = ("transformers.modeling_utils", "diffusers.models.modeling_utils")
    logs = [logging.getLogger(name) for name in names]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for log in logs:
        log.addFilter(is_error)  # a higher level of the first would start a check that logs more
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(is_error)
