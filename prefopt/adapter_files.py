"""Files of LoRA adapters, read layer by layer: peft's folders, and the files that diffusers' pipelines load.

A layer's update of its weight is scaling * B A. Where the scaling comes from:

    peft's folder          adapter_config.json: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA, by layer
                           where alpha_pattern and rank_pattern say so
    diffusers, metadata    the same config for each component, in the header of the file
    other diffusion files  alpha / r if the file holds a tensor `<layer>.alpha`, else 1

Only safetensors. An adapter whose update is anything else (DoRA, other kinds of adapters) is an InputError
that says why.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from prefopt.adapters import (
    ADAPTER_FILE,
    ANEW,
    CONFIG_FILE,
    adapter_folder,
    check_base_unchanged,
    header_configs,
)
from prefopt.diffusion.generator import adapter_file
from prefopt.errors import InputError
from prefopt.files import open_tensors, read_object, replacing, reporting_write_errors, write_atomically
from prefopt.hub import ADAPTER_FILE as DIFFUSION_FILE
from prefopt.hub import adapter_place

_PEFT = "base_model.model."  # what every name in peft's files begins with
_FIRST_FACTOR = re.compile(
    r"(?P<layer>.+)[._](?P<factor>lora_A|lora_embedding_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"(?P<rest>\..*)?"
)
_DORA = "it is a DoRA, whose magnitudes are not linear in the factors"
_OTHER = "the update of a layer is not scaling * B A"
_REFUSED = {  # options of peft's LoraConfig
    "use_dora": _DORA,
    "lora_bias": "it has biases beside the factors",
    "target_parameters": "the factors of several experts lie in one tensor",
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), _OTHER),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "use_qalora"), _OTHER),
}
LARGEST_ALPHA = 1e9
_EQUAL = ("fan_in_fan_out", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's tensors, not yet read, and what gives each layer its scaling.

    `configs` are peft's, keyed by how the names they are about begin: one `base_model.model.` in peft's
    format, `unet.`, `text_encoder.` ... in diffusers' with metadata, none in other files. `whole` are
    weights that were trained in full: `modules_to_save`, embeddings, biases.
    """

    name: str  # as the user named it
    path: Path
    tensors: Any  # of safetensors.safe_open
    pairs: dict[str, tuple[str, str]]  # layer -> the names of A, (r, d_in), and B, (d_out, r)
    alphas: dict[str, float]
    whole: tuple[str, ...]
    configs: dict[str, dict[str, Any]]

    @property
    def in_peft_format(self) -> bool:
        return _PEFT in self.configs

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self.tensors.get_slice(name).get_shape())

    def rank(self, layer: str) -> int:
        """The rank of a layer's factors."""
        return self.shape(self.pairs[layer][0])[0]

    def component(self, layer: str) -> str:
        """The part of the model that a layer belongs to: all of a part's layers are written with one rank."""
        return next((part for part in self.configs if layer.startswith(part)), layer.split(".")[0])

    def scaling(self, layer: str) -> float:
        """What B A is multiplied by."""
        r, part = self.rank(layer), self.component(layer)
        if self.configs and part not in self.configs:
            raise InputError(f"{self.name}: its metadata says nothing about {layer}")
        config = self.configs.get(part, {"r": r, "lora_alpha": self.alphas.get(layer, r)})
        inner = layer.removeprefix(part)
        configured = self._of_layer(config, "rank_pattern", "r", inner)
        if configured != r:
            raise InputError(f"{self.name}: {layer} has rank {r} in the tensors, {configured} in the config")
        alpha = self._of_layer(config, "alpha_pattern", "lora_alpha", inner)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < LARGEST_ALPHA:
            raise InputError(
                f"{self.name}: the alpha of {layer} is {str(alpha)[:40]}, no number under {LARGEST_ALPHA:g}"
            )
        return alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    def _of_layer(self, config: Mapping[str, Any], pattern: str, default: str, layer: str) -> Any:
        patterns = config.get(pattern) or {}
        try:
            return patterns.get(get_pattern_key(list(patterns), layer), config.get(default))
        except (AttributeError, TypeError, re.error) as error:
            raise InputError(
                f"{self.name}: its {pattern} is {patterns}, which names no layers: {error}. {ANEW}"
            ) from error

    def tensor(self, name: str) -> Tensor:
        """One tensor; values that are not finite are an InputError."""
        value = self.tensors.get_tensor(name)
        if not value.isfinite().all():
            raise InputError(f"{self.name}: {name} holds values that are not finite; train it again")
        return value


# Reading


def read_adapter(adapter: str | Path) -> AdapterFile:
    """The adapter of a folder, file or hub id, in peft's format or in a file that diffusers loads."""
    name, path = str(adapter), adapter_place(adapter, CONFIG_FILE, ADAPTER_FILE, DIFFUSION_FILE)
    if path.name == ADAPTER_FILE:
        path = path.parent
    diffusion = not (path / CONFIG_FILE).is_file()
    file = adapter_file(adapter) if diffusion else Path(adapter_folder(str(path))) / ADAPTER_FILE
    tensors = open_tensors(file, ANEW)
    if diffusion:
        configs = header_configs(file, name)
    else:
        configs = {_PEFT: read_object(file.parent / CONFIG_FILE, ANEW)}
    for config in configs.values():
        _check_config(config, name)
    return _described(name, file, tensors, configs)


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """InputError unless this is a LoRA whose update is scaling * B A, on the base weights as they are."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{name} is of the type {kind}; only LORA adapters are read")
    if refused := next((option for option in _REFUSED if config.get(option)), None):
        raise InputError(f"{name} is no plain LoRA ({refused}): {_REFUSED[refused]}")
    layers = config.get("target_modules")
    if not isinstance(layers, str | list | None) or not all(isinstance(layer, str) for layer in layers or ()):
        raise InputError(f"{name}: its target_modules are {layers}, no names of layers. {ANEW}")
    check_base_unchanged(config, name)


def _described(name: str, path: Path, tensors: Any, configs: dict[str, dict[str, Any]]) -> AdapterFile:
    """Find the pairs of factors; InputError for none, for a factor alone and for what is no factor."""
    left = set(tensors.keys())
    pairs: dict[str, tuple[str, str]] = {}
    for first in sorted(left):
        if found := _FIRST_FACTOR.fullmatch(first):
            factor = found["factor"]
            other = f"{factor[:-1]}B" if factor.endswith("A") else factor.replace("down", "up")
            second = first[: found.start("factor")] + other + (found["rest"] or "")
            if second in left:
                pairs[found["layer"]] = (first, second)
                left -= {first, second}
    # Where there is a config, it has the alphas; such tensors are then an error below.
    named = {} if configs else {layer: f"{layer}.alpha" for layer in pairs if f"{layer}.alpha" in left}
    if several := [alpha for alpha in named.values() if math.prod(tensors.get_slice(alpha).get_shape()) != 1]:
        raise InputError(f"{name}: {several[0]} is not one number; {ANEW}")
    alphas = {layer: tensors.get_tensor(alpha).item() for layer, alpha in named.items()}
    whole = tuple(sorted(left - set(named.values())))
    file = AdapterFile(name, path, tensors, pairs, alphas, whole, configs)
    _check_names(file)
    for layer in pairs:
        _check_shapes(file, layer)
    return file


def _check_names(file: AdapterFile) -> None:
    """InputError for tensors that are neither factors nor, in peft's format, weights trained in full."""
    rest, in_peft_format = file.whole, file.in_peft_format
    if dora := [name for name in rest if "magnitude_vector" in name or "dora_scale" in name]:
        raise InputError(f"{file.name} is no plain LoRA ({dora[0]}): {_DORA}")
    if stray := [name for name in rest if not in_peft_format or re.search(r"[._]lora_", name)]:
        raise InputError(
            f"{file.name}: {stray[0]} belongs to no pair of LoRA factors ({len(stray)} such tensors); "
            "only adapters of pairs A and B are read"
        )
    if not file.pairs:
        raise InputError(f"{file.name} holds no LoRA factors, and {len(rest)} other tensors")
    if foreign := [layer for layer in file.pairs if layer.startswith(_PEFT) != in_peft_format]:
        raise InputError(
            f"{file.name}: {foreign[0]} is no name of its format; peft's begin with {_PEFT} and have "
            f"{CONFIG_FILE} beside them, diffusers' with a component, as unet."
        )


def _check_shapes(file: AdapterFile, layer: str) -> None:
    first, second = file.pairs[layer]
    A, B = file.shape(first), file.shape(second)
    if len(A) < 2 or 0 in (*A, *B):
        raise InputError(f"{file.name}: {first} is empty or no matrix: its shape is {A}, {second}'s is {B}")
    # A convolution's B is 1 x 1, (d_out, r, 1, 1). Of one in groups, B has r / groups columns: there the
    # factors of different adapters cannot stand side by side.
    if len(A) != len(B) or A[0] != B[1] or set(B[2:]) - {1}:
        raise InputError(
            f"{file.name}: {first} {A} and {second} {B} do not make a matrix product (a grouped convolution "
            "does not); such adapters are not read"
        )


# Comparing


def check_alike(files: Sequence[AdapterFile]) -> None:
    """InputError unless all are adapters of the same layers of the same model, in the same format."""
    first = files[0]
    for file in files[1:]:
        both = f"{first.name} and {file.name}"
        if file.in_peft_format != first.in_peft_format:
            raise InputError(f"{both} are not of one format: peft's and diffusers' are not averaged together")
        if missing := sorted({*first.pairs, *first.whole} ^ {*file.pairs, *file.whole}):
            lacking = file if missing[0] in {*first.pairs, *first.whole} else first
            raise InputError(
                f"{both} are about different layers: {len(missing)} are in one of them only; "
                f"{missing[0]} is missing in {lacking.name}"
            )
        for layer, names in first.pairs.items():
            (A, B), (other_A, other_B) = map(first.shape, names), map(file.shape, file.pairs[layer])
            if (A[1:], B[0]) != (other_A[1:], other_B[0]):
                raise InputError(
                    f"{both} do not fit one model: the factors of {layer} are {A} and {B} in the first, "
                    f"{other_A} and {other_B} in the second"
                )
        for name in first.whole:
            if first.shape(name) != file.shape(name):
                raise InputError(f"{both}: {name} is {first.shape(name)} and {file.shape(name)}")
        for part in first.configs.keys() & file.configs.keys():
            _check_options(first.configs[part], file.configs[part], both)


def _check_options(one: Mapping[str, Any], other: Mapping[str, Any], both: str) -> None:
    for option in ("base_model_name_or_path", "revision", *_EQUAL):
        values = one.get(option), other.get(option)
        unknown = option not in _EQUAL and None in values  # an adapter need not know its base model
        if values[0] != values[1] and not unknown:
            raise InputError(
                f"{both} differ in {option}: {values[0]!r} and {values[1]!r}. If the two mean the same, edit "
                f"the {CONFIG_FILE} of one"
            )


# Writing


def write_adapter(
    like: AdapterFile, folder: str | Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> Path:
    """Write an adapter in the format and with the config of `like`, read it back, and return its file.

    The scaling of every layer is 1: alpha is the rank, which `ranks` gives by component. So also a reader
    that knows neither metadata nor patterns reads it rightly.
    """
    folder = Path(folder)
    path = folder / (ADAPTER_FILE if like.in_peft_format else DIFFUSION_FILE)
    configs = {part: _plain(config, ranks[part]) for part, config in like.configs.items() if part in ranks}
    alphas = {f"{layer}.alpha": torch.tensor(float(ranks[like.component(layer)])) for layer in like.alphas}
    header = {"format": "pt"}
    if configs and not like.in_peft_format:
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

        options = {f"{part}{option}": v for part, config in configs.items() for option, v in config.items()}
        # The only entry: safetensors writes several in an order of chance.
        header = {LORA_ADAPTER_METADATA_KEY: json.dumps(options, sort_keys=True)}
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({**tensors, **alphas}, partial, header)
        if like.in_peft_format:
            write_atomically(folder / CONFIG_FILE, json.dumps(configs[_PEFT], indent=2, sort_keys=True))
    written = read_adapter(path)
    if changed := [name for name, value in tensors.items() if not torch.equal(value, written.tensor(name))]:
        raise RuntimeError(f"{path} is not what was written: {changed[0]} differs")
    return path


def _plain(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A config of the same layers with alpha = r; no training had one dropout, so there is none."""
    changes: dict[str, Any] = {
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "eva_config": None,
    }
    kept = {option: changes.get(option, value) for option, value in config.items()}
    return {**kept, "r": rank, "lora_alpha": rank}
