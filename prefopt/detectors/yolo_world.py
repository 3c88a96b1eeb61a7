"""YOLO-World v2 (arXiv 2401.17270) through ultralytics, which is AGPL-3.0 and an optional extra.

A model is a folder of `config.json` (`YoloWorldSettings`) and `model.safetensors`; its layers are those of
ultralytics' own yolov8-worldv2, scaled. ultralytics' .pt files are pickles and are not read here:
scripts/convert_yolo_world.py converts one. Of ultralytics only the network is used: no predictor, no trainer,
no downloads, no telemetry.
"""

import atexit
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_convert

from prefopt import pocket
from prefopt.detectors import Box
from prefopt.detectors.selecting import MAX_OVERLAP, MIN_CONFIDENCE, distinct, in_batches, select
from prefopt.detectors.text import ClassEmbeddings
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.loading import check_finite, files_identity, first_line
from prefopt.model_files import check_files, read_config

MODEL_TYPE = "yolo_world"
WEIGHTS_FILE = "model.safetensors"
CONVERTER = "scripts/convert_yolo_world.py"
_GREY = (114, 114, 114)  # around an image that is not square, as in training


@dataclass(frozen=True)
class YoloWorldSettings:
    """The content of a model's config.json."""

    depth: float  # factor on how often blocks repeat
    width: float  # factor on channels
    max_channels: int  # before `width`
    image_size: int  # pixels of the square that an image is fitted into, a multiple of 32
    clip: str = "openai/clip-vit-base-patch32"  # whose text embeddings the classes are, 512 numbers at most
    clip_revision: str | None = None
    template: str = "{}"  # how a class is worded for CLIP

    def __post_init__(self):
        for name, kind, most in (
            ("depth", float, 10),
            ("width", float, 10),
            ("max_channels", int, 2**14),
            ("image_size", int, 2**14),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r} but must be a number in (0, {most}]")
        if self.image_size % 32:
            raise ValueError(f"image_size is {self.image_size} but must be a multiple of 32")
        if "{}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{}} for the class")

    def to_json(self) -> str:
        """As config.json says it."""
        return json.dumps({"model_type": MODEL_TYPE, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder's config.json; InputError if it is none of ours."""
        values = read_config(folder)
        try:
            if values.pop("model_type", None) != MODEL_TYPE:
                raise ValueError(f"its model_type is not {MODEL_TYPE!r}")
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{folder}/config.json describes no YOLO-World: {error}; {CONVERTER} writes such a folder"
            ) from error


@cache
def ultralytics_tasks() -> Any:
    """Import `ultralytics.nn.tasks` offline and quietly, with its settings in a temporary folder.

    Its replacements of PIL's and torch's own functions are undone: its `Image.open` would install a package
    where a picture cannot be read.
    """
    scratch = tempfile.mkdtemp(prefix="ultralytics-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    environment, image_open, torch_save = dict(os.environ), Image.open, torch.save
    os.environ.update(
        YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false", YOLO_CONFIG_DIR=scratch
    )
    try:
        # It sets its own way of printing arrays, and the number of threads of whatever is started later.
        with np.printoptions():
            return importlib.import_module("ultralytics.nn.tasks")
    except ImportError as error:
        raise InputError(
            f"YOLO-World needs ultralytics ({error}): install it with `pip install prefopt[ultralytics]`; it "
            "is AGPL-3.0, and so is what is distributed together with it. OWLv2 (--detector "
            "google/owlv2-base-patch16-ensemble) needs nothing more"
        ) from error
    finally:
        Image.open, torch.save = image_open, torch_save
        os.environ.clear()
        os.environ.update(environment)


def build(settings: YoloWorldSettings) -> Any:
    """ultralytics' WorldModel with random weights, in training mode."""
    tasks = ultralytics_tasks()
    layers = tasks.yaml_model_load("yolov8-worldv2.yaml")
    layers["scales"] = {"ours": [settings.depth, settings.width, settings.max_channels]}
    return tasks.WorldModel(layers | {"scale": "ours"}, verbose=False)


def predict(model: Any, pixels: Tensor, text: Tensor) -> Any:
    """The raw output for (n, 3, side, side) pixels in 0..1, each asked for its own (n, k, 512) classes."""
    model.model[-1].nc = text.shape[1]
    return model.predict(pixels, txt_feats=text)


def identity(
    model_name_or_path: str = "pocket",
    *,
    clip_model_name_or_path: str | None = None,
    min_confidence: float = MIN_CONFIDENCE,
    max_overlap: float = MAX_OVERLAP,
) -> str:
    """All that the boxes depend on, from the files of the model and of its CLIP: nothing is loaded."""
    folder = _folder(model_name_or_path)
    clip, revision = _clip(YoloWorldSettings.load(folder), clip_model_name_or_path)
    files = [files_identity(folder), files_identity(pocket.resolve(clip, "clip"), revision)]
    return content_key(json.dumps([MODEL_TYPE, *files, min_confidence, max_overlap]))


def _folder(model_name_or_path: str) -> Path:
    folder = Path(pocket.resolve(str(model_name_or_path), "yolo_world"))
    if folder.suffix == ".pt":
        raise InputError(f"{folder} is a pickle, which can run any code: convert it with {CONVERTER}")
    return folder


def _clip(settings: YoloWorldSettings, name: str | None) -> tuple[str, str | None]:
    """The CLIP that embeds the classes, with its revision: `name`, or the one of the model's settings."""
    return (settings.clip, settings.clip_revision) if name is None else (name, None)


class YoloWorld:
    """A detector by a folder with a YOLO-World, or `pocket`.

    `clip_model_name_or_path` replaces the CLIP that the folder names. Boxes under `min_confidence` are left
    out; of two of one class that overlap by more than `max_overlap` the more confident one is kept.
    """

    def __init__(
        self,
        model_name_or_path: str = "pocket",
        *,
        clip_model_name_or_path: str | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        min_confidence: float = MIN_CONFIDENCE,
        max_overlap: float = MAX_OVERLAP,
    ):
        folder = _folder(model_name_or_path)
        self.settings = settings = YoloWorldSettings.load(folder)
        self.model = build(settings)
        check_files(folder)
        try:
            self.model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{folder / WEIGHTS_FILE} is not what its config.json describes: {first_line(error)}"
            ) from error
        check_finite(self.model.state_dict(), f"the YOLO-World in {folder}")
        self.model.eval().to(device)
        self.device, self.batch_size = device, batch_size
        self.min_confidence, self.max_overlap = min_confidence, max_overlap
        clip, clip_revision = _clip(settings, clip_model_name_or_path)
        self.embeddings = ClassEmbeddings(clip, clip_revision, template=settings.template, device=device)
        self.identity = identity(
            model_name_or_path,
            clip_model_name_or_path=clip_model_name_or_path,
            min_confidence=min_confidence,
            max_overlap=max_overlap,
        )

    def detect(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[list[Box]]:
        """The boxes of each image, the most confident first, asked for its own classes."""
        asked = distinct(images, classes)
        return in_batches(images, asked, self.batch_size, self._detect)

    @torch.no_grad()
    def _detect(self, images: list[Image.Image], classes: list[list[str]]) -> list[list[Box]]:
        fitted = [fit(image, self.settings.image_size) for image in images]
        pixels = torch.stack([pixels for pixels, _, _ in fitted]).to(self.device)
        text = torch.stack([self.embeddings(names) for names in classes])
        output, _ = predict(self.model, pixels, text)  # (n, 4 + classes, places): centre, size, scores
        corners = box_convert(output[:, :4].transpose(1, 2).float().cpu(), "cxcywh", "xyxy")
        scores = output[:, 4:].transpose(1, 2)
        return [
            select(
                (corners[i] - offset) / scale,
                scores[i],
                classes[i],
                images[i].size,
                min_confidence=self.min_confidence,
                max_overlap=self.max_overlap,
            )
            for i, (_, offset, scale) in enumerate(fitted)
        ]


def fit(image: Image.Image, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """An image in the middle of a square, and where it lies: a place p of it comes to p * scale + offset.

    Pixels (3, side, side) in 0..1; offset and scale (4,) for left, top, right, bottom. Proportions are kept
    to a pixel, and bars of grey fill the rest.
    """
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    left, top = (side - width) // 2, (side - height) // 2
    square = Image.new("RGB", (side, side), _GREY)
    square.paste(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), (left, top))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    offset = torch.tensor([left, top, left, top], dtype=torch.float32)
    scale = torch.tensor([width / image.width, height / image.height] * 2, dtype=torch.float32)
    return pixels, offset, scale
