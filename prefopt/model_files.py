"""The files of a model's folder, checked before a library reads them.

What the libraries say of a damaged file seldom names it, and a pipe in its place would stop them for good.
Importing this imports no model library.
"""

from functools import cache
from pathlib import Path
from typing import Any

from prefopt.errors import InputError
from prefopt.files import file_state, open_tensors, read_object

CONFIG_FILE = "config.json"
MODEL_FILE = "model_index.json"  # of a pipeline
_OBJECTS = (CONFIG_FILE, "_index.json", ".index.json", "tokenizer.json")  # ends of names
_REMEDY = "Save or download the model again, or name another one"


def check_files(folder: Path, remedy: str = _REMEDY) -> None:
    """InputError for a file of the folder, not of those in it, that is damaged, or named and not there.

    It ends with `remedy`. Looked at are configs, indices of weights, tokenizers and headers of safetensors.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name.endswith(_OBJECTS):
            _check(path, remedy, *(file_state(path) if path.is_file() else ()))


def read_config(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """What a config of the folder says; InputError without one."""
    return read_object(folder / name, _REMEDY)


@cache
def _check(path: Path, remedy: str, *state: int) -> None:
    if path.suffix == ".safetensors":
        open_tensors(path, remedy)
        return
    content = read_object(path, remedy)
    if path.name.endswith(".safetensors.index.json"):
        shards = content.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{path} names no weights: it has no weight_map. {remedy}")
        for shard in {str(name) for name in shards.values()}:
            if shard != Path(shard).name:
                raise InputError(f"{path} names the file {shard!r}, which is not in its folder. {remedy}")
            if not (path.parent / shard).is_file():
                raise InputError(f"{path} names the file {shard!r}, which is not there. {remedy}")
