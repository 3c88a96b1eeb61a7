"""Tensors that frozen models computed once, kept on disk by content key.

A store is a folder of safetensors shards and one `identity.json`, which says what the values depend on
(weights, resolution, dtype). Shards are written whole and renamed into place, so a killed run leaves only
finished ones, and any number of processes may write side by side.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefopt.errors import InputError
from prefopt.files import check_identity, content_key, open_tensors, replacing, reporting_write_errors

ABOUT = "about"  # the entry in a shard's header
AGAIN = "Delete this file, and run the same command again"
OPEN_SHARDS = 256  # of one process: each is a memory map, and a process may have 65,530 on Linux


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes: who some weights are, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorStore:
    """Named tensors by content key, on disk; opening a store of another identity is an InputError."""

    def __init__(self, folder: str | Path, identity: Mapping[str, str]):
        self.folder = Path(folder)
        self.identity = dict(identity)
        with reporting_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            check_identity(self.folder, self.identity, what="cache", option="--cache_dir")
        self._shard_of: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        if key not in self._shard_of:
            raise KeyError(f"{key} is not in the cache {self.folder}")
        shard = self._shard_of[key]
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = self._opened(shard)
        handle = self._open[shard]
        try:
            return {name: handle.get_tensor(f"{key}/{name}") for name in self._names(handle)}
        except SafetensorError as error:
            raise InputError(f"{shard} does not hold the whole entry {key}: {error}. {AGAIN}") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # an open file does not travel to a spawned worker

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys not yet stored, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self._shard_of]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store one shard of entries; every entry of a store has the same names."""
        names = sorted(next(iter(entries.values())))
        tensors = {
            f"{key}/{name}": entry[name].clone(memory_format=torch.contiguous_format)
            for key, entry in entries.items()
            for name in names
        }
        shard = self.folder / f"{content_key(' '.join(sorted(entries)))[:32]}.safetensors"
        with reporting_write_errors(self.folder), replacing(shard) as partial:
            about = json.dumps({"identity": self.identity, "names": names}, sort_keys=True)
            save_file(tensors, partial, metadata={ABOUT: about})  # several come in an order of chance
        self._shard_of.update(dict.fromkeys(entries, shard))

    def refresh(self) -> None:
        """Read the shards' indices again, other processes' among them."""
        known = set(self._shard_of.values())
        for shard in sorted(set(self.folder.glob("[!.]*.safetensors")) - known):
            with self._opened(shard) as handle:
                keys = {name.split("/", 1)[0] for name in handle.keys()}  # noqa: SIM118 (not a dict)
            self._shard_of.update(dict.fromkeys(keys, shard))

    def _opened(self, shard: Path) -> safe_open:
        """A shard of this store; a damaged one, or one of another store, is an InputError."""
        if not os.path.lexists(shard):
            raise InputError(f"{shard} was removed meanwhile: run the same command again")
        handle = open_tensors(shard, AGAIN)
        about = (handle.metadata() or {}).get(ABOUT, "")
        if about[:1] != "{" or json.loads(about)["identity"] != self.identity:
            raise InputError(f"{shard} was written for another cache than {self.folder}. {AGAIN}")
        return handle

    @staticmethod
    def _names(handle: safe_open) -> list[str]:
        return json.loads(handle.metadata()[ABOUT])["names"]
