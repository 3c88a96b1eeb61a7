"""Adapters by name, in whatever format: a folder, a file, a hub id, or a file of a hub id.

Importing this imports no model library.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefopt.errors import InputError
from prefopt.options import check_name, is_local_path

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # of a diffusion model, as diffusers calls it

Found = TypeVar("Found")


def adapter_place(adapter: str | Path, *files: str) -> Path:
    """The folder or file of an adapter: the one named, or a download of a hub id, of these files alone.

    `org/name/file.safetensors` names one file of a hub id. What is found neither here nor on the hub is an
    InputError.
    """
    check_name(adapter, "the adapter's name")
    if Path(adapter).exists():
        return Path(adapter)
    if is_local_path(str(adapter)):
        raise InputError(f"no adapter {str(adapter)!r}: there is no {adapter} here")
    import huggingface_hub

    if file := re.fullmatch(r"([^/]+/[^/]+)/([^/]+\.safetensors)", str(adapter)):
        return Path(_from_hub(adapter, lambda: huggingface_hub.hf_hub_download(file[1], file[2])))
    name, patterns = str(adapter), list(files)
    return Path(_from_hub(adapter, lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns)))


def files_at(adapter: str | Path) -> list[str]:
    """The names of the files in an adapter's folder, or at the top of its hub id; none of their folders.

    If the hub cannot be reached, those of a hub id are what was downloaded before.
    """
    if Path(adapter).is_dir():
        return sorted(path.name for path in Path(adapter).iterdir() if path.is_file())
    import huggingface_hub
    from httpx2 import ConnectError, TimeoutException
    from huggingface_hub.errors import OfflineModeIsEnabled

    def listed() -> list[str]:
        try:
            return huggingface_hub.list_repo_files(str(adapter))
        except (ConnectError, TimeoutException, OfflineModeIsEnabled):
            folder = huggingface_hub.snapshot_download(
                str(adapter), allow_patterns="*.safetensors", ignore_patterns="*/*", local_files_only=True
            )
            return os.listdir(folder)

    return sorted(name for name in _from_hub(adapter, listed) if "/" not in name)


def _from_hub(adapter: str | Path, call: Callable[[], Found]) -> Found:
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

    try:
        return call()
    except (OSError, ValueError, EntryNotFoundError, RevisionResolutionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"no adapter {str(adapter)!r}: no such folder or file is here, and as a hub id it could not be "
            f"loaded ({reason})"
        ) from error
