"""Which detector a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import pocket
from prefopt.detectors import Detector


def load_detector(name_or_path: str, *, revision: str | None = None, device: Any = "cpu") -> Detector:
    """YOLO-World for the pocket and for a folder with a model.yaml, OWLv2 for any other folder or hub id."""
    name = pocket.resolve(name_or_path, "yolo_world")
    if Path(name, "model.yaml").is_file() or name.endswith(".pt"):
        from prefopt.detectors.yolo_world import YoloWorld  # ultralytics is an extra

        return YoloWorld(name, device=device)
    from prefopt.detectors.owlv2 import Owlv2

    return Owlv2(name, revision=revision, device=device)
