"""Open-vocabulary detection: images and the names of classes go in, boxes come out."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image


class Box(NamedTuple):
    """One detection."""

    label: str
    confidence: float  # 0..1; those of different detectors are not comparable
    left: float  # pixels of the image, right > left, bottom > top
    top: float
    right: float
    bottom: float


class Detector(Protocol):
    """Anything that detects; `identity` changes with all that its boxes depend on."""

    identity: str

    def detect(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[list[Box]]:
        """The boxes of each image, the most confident first, asked for its own classes."""
        ...
