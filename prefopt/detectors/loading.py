"""Detectors by name. What a detector's boxes depend on is known before it is loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt import pocket
from prefopt.detectors import Detector, owlv2, yolo_world
from prefopt.errors import InputError
from prefopt.loading import Lazy


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
    if name.endswith(".pt") or (kind := _model_type(name, revision)) == yolo_world.MODEL_TYPE:
        load = partial(yolo_world.YoloWorld, name, device=device, **options)
        return Lazy(yolo_world.identity(name, **settings), load)
    if kind == owlv2.MODEL_TYPE:
        load = partial(owlv2.Owlv2, name, revision, device=device, **options)
        return Lazy(owlv2.identity(name, revision, **settings), load)
    raise InputError(
        f"{name_or_path} is a {kind!r}; detectors are {yolo_world.MODEL_TYPE!r} (a folder as "
        f"{yolo_world.CONVERTER} writes it) and {owlv2.MODEL_TYPE!r} (google/owlv2-base-patch16-ensemble)"
    )


def _model_type(name: str, revision: str | None) -> Any:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is no folder or hub id with a config.json: {error}") from error
    return config.get("model_type")
