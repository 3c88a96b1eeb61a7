"""Which detector a name is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt import pocket
from prefopt.detectors import Detector, owlv2, yolo_world
from prefopt.records import InputError


def load_detector(
    name_or_path: str, *, revision: str | None = None, device: str | torch.device = "cpu", **options: Any
) -> Detector:
    """The detector of a folder or hub id, by the `model_type` of its config.json; `pocket` is a YOLO-World.

    `options` (batch_size, min_confidence, max_overlap) go to `Owlv2` or `YoloWorld`.
    """
    if name_or_path.endswith(".pt"):
        return yolo_world.YoloWorld(name_or_path)
    name = pocket.resolve(name_or_path, "yolo_world")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"{name_or_path} is no folder or hub id with a config.json: {error}") from error
    kind = config.get("model_type")
    if kind == yolo_world.MODEL_TYPE:
        return yolo_world.YoloWorld(name, device=device, **options)
    if kind == owlv2.MODEL_TYPE:
        return owlv2.Owlv2(name, revision, device=device, **options)
    raise InputError(
        f"{name_or_path} is a {kind!r}; detectors are {yolo_world.MODEL_TYPE!r} (a folder as "
        f"{yolo_world.CONVERTER} writes it) and {owlv2.MODEL_TYPE!r} (google/owlv2-base-patch16-ensemble)"
    )
