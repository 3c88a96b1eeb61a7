"""LoRA files under kohya's names, which ComfyUI, AUTOMATIC1111's web UI and programs like them read.

    lora_unet_<layer>.lora_down.weight    (r, d_in), the first factor
    lora_unet_<layer>.lora_up.weight      (d_out, r), the second one
    lora_unet_<layer>.alpha               a number: the layer's update is alpha / r * up down

A layer has diffusers' name, with underscores, for SDXL too: these programs and diffusers find it by that.
Left out: names in the layout of SDXL's original checkpoint, as kohya's own sd-scripts write and expect them.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from prefopt.adapter_files import read_adapter
from prefopt.errors import InputError
from prefopt.files import replacing, reporting_write_errors

_COMPONENT = "unet."
_FACTORS = ".lora_A.weight", ".lora_B.weight"


def write_kohya(adapter: str | Path, path: str | Path) -> int:
    """Write a LoRA that a recipe or diffusers saved to a file under kohya's names; the number of its layers.

    `adapter` is a folder, a file or a hub id. One in another format, or with layers of other parts than the
    denoiser, is an InputError.
    """
    path, file = Path(path), read_adapter(adapter)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name of a safetensors file; name one that ends in .safetensors")
    if path.resolve() == file.path.resolve():
        raise InputError(f"{path} is the adapter itself; name another file to write")
    tensors = {}
    for layer, names in file.pairs.items():
        if names != tuple(f"{layer}{factor}" for factor in _FACTORS):
            raise InputError(
                f"{file.name}: {names[0]} is not named as diffusers names it, <part>.<layer>{_FACTORS[0]}; a "
                "file under kohya's names needs no conversion, and any other is first saved by diffusers"
            )
        if not layer.startswith(_COMPONENT):
            raise InputError(
                f"{file.name}: {layer} is no layer of the {_COMPONENT[:-1]}; others are not converted"
            )
        key = f"lora_{layer.replace('.', '_')}"
        down, up = map(file.tensor, names)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(file.scaling(layer) * len(down))
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, {"format": "pt"})
    return len(file.pairs)
