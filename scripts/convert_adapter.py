"""Converts a LoRA for ComfyUI and A1111: convert_adapter.py --adapter runs/dpo --output_file dpo.safetensors

The adapter is a folder, a file or a hub id of a LoRA for Stable Diffusion 1.x, 2.x or XL, as the recipes and
diffusers save it. The file has kohya's names (lora_unet_..., .lora_down, .lora_up, .alpha). ComfyUI, A1111's
web UI and diffusers' load_lora_weights read it; kohya's sd-scripts read it for 1.x and 2.x, not for XL.
"""

import argparse
import sys
from pathlib import Path

from prefopt.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="a folder, a file or a hub id")
    parser.add_argument("--output_file", type=Path, required=True, help="a name that ends in .safetensors")
    options = parser.parse_args()

    from prefopt.kohya import write_kohya  # loads torch, which --help need not wait for

    try:
        layers = write_kohya(options.adapter, options.output_file)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output_file}: {layers} layers, {options.output_file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
