"""Makes a detector's folder of YOLO-World v2 weights: convert_yolo_world.py yolov8s-worldv2.pt FOLDER

A .pt is a pickle, which can run any code when it is read. This reads it with `weights_only=True` and
ultralytics' list of its own layers, so that anything else in the file is an error; still, convert only what
you trust. Needs the extra `ultralytics` (AGPL-3.0). The folder holds config.json and model.safetensors;
classes will be embedded by the CLIP that `--clip` names, the one it was trained with (ViT-B/32).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prefopt.detectors.yolo_world import YoloWorldSettings, build, ultralytics_tasks
from prefopt.errors import InputError
from prefopt.files import replacing, reporting_write_errors, write_atomically


def read(path: Path) -> Any:
    """The network that a .pt holds, in float32; InputError for a file that is none or holds more."""
    if path.suffix != ".pt" or not path.is_file():
        raise InputError(f"{path} is no .pt file here; nothing is fetched")
    try:
        # By its whole path: a bare name of ultralytics' own would be looked for online.
        content, _ = ultralytics_tasks().torch_safe_load(str(path.resolve()), safe_only=True)
        model = content.get("ema") or content["model"]
        if type(model).__name__ != "WorldModel":
            raise TypeError(f"it holds a {type(model).__name__}")
        return model.float()
    except (OSError, RuntimeError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a YOLO-World without trusting it: {error}") from error


def convert(source: Path, folder: Path, *, image_size: int, clip: str) -> None:
    """Write `folder`; InputError if the layers are not yolov8-worldv2's."""
    model = read(source)
    depth, width, most = model.yaml["scales"][model.yaml["scale"]]
    settings = YoloWorldSettings(depth, width, most, image_size=image_size, clip=clip)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}
    try:
        build(settings).load_state_dict(kept)
    except RuntimeError as error:
        raise InputError(
            f"the layers of {source} are not those of yolov8-worldv2 (a version 1 model?): {error}"
        ) from error
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as path:
            save_file({name: tensor.contiguous() for name, tensor in kept.items()}, path)
        write_atomically(folder / "config.json", settings.to_json())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_size", type=int, default=640, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--clip", default="openai/clip-vit-base-patch32", help="folder or hub id (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        convert(options.source, options.folder, image_size=options.image_size, clip=options.clip)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
