"""Detectors by name. What a detector's boxes depend on is known before it is loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from prefopt import pocket
from prefopt.detectors import Detector, owlv2, yolo_world
from prefopt.errors import InputError
from prefopt.loading import Lazy, model_config


def load_detector(
    name_or_path: str, *, revision: str | None = None, device: str | torch.device = "cpu", **options: Any
) -> Detector:
    """The detector of a folder or hub id, by the `model_type` of its config.json; `pocket` is a YOLO-World.

    `options` (batch_size, min_confidence, max_overlap) go to `Owlv2` or `YoloWorld`.
    """
    return lazy_detector(name_or_path, revision=revision, device=device, **options).load()


def lazy_detector(
    name_or_path: str, *, revision: str | None = None, device: str | torch.device = "cpu", **options: Any
) -> Lazy[Detector]:
    """The same, loaded at its first use."""
    name = name_or_path if name_or_path.endswith(".pt") else pocket.resolve(name_or_path, "yolo_world")
    settings = {name: value for name, value in options.items() if name != "batch_size"}
    load: Callable[[], Detector]
    kind = None if name.endswith(".pt") else model_config(name, revision).get("model_type")
    if name.endswith(".pt") or kind == yolo_world.MODEL_TYPE:
        load = partial(yolo_world.YoloWorld, name, device=device, **options)
        return Lazy(yolo_world.identity(name, **settings), load)
    if kind == owlv2.MODEL_TYPE:
        load = partial(owlv2.Owlv2, name, revision, device=device, **options)
        return Lazy(owlv2.identity(name, revision, **settings), load)
    raise InputError(
        f"{name_or_path} is a {kind!r}; detectors are {yolo_world.MODEL_TYPE!r} (a folder as "
        f"{yolo_world.CONVERTER} writes it) and {owlv2.MODEL_TYPE!r} (google/owlv2-base-patch16-ensemble)"
    )
