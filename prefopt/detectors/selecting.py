"""From a network's output at every place of an image to the boxes that count."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from prefopt.detectors import Box

MIN_CONFIDENCE, MAX_OVERLAP = 0.05, 0.5  # what detectors use unless told otherwise


def select(
    corners: Tensor,
    scores: Tensor,
    classes: Sequence[str],
    size: tuple[int, int],
    *,
    min_confidence: float,
    max_overlap: float,
    most: int = 100,
) -> list[Box]:
    """The boxes of one image, the most confident first.

    `corners` (n, 4) are left, top, right, bottom in pixels of the image of `size` (width, height); `scores`
    (n, len(classes)) 0..1. Boxes are cut at the image's edges; of two of one class that overlap by more than
    `max_overlap` (intersection over union) the more confident one is kept.
    """
    corners, scores = corners.float().cpu(), scores.float().cpu()
    places, labels = torch.where(scores >= min_confidence)
    confidences = scores[places, labels]
    cut = corners[places].clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float32))
    inside = (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
    cut, confidences, labels = cut[inside], confidences[inside], labels[inside]
    kept = batched_nms(cut, confidences, labels, max_overlap)[:most]
    return [
        Box(classes[int(label)], confidence, *edges)
        for label, confidence, edges in zip(
            labels[kept].tolist(), confidences[kept].tolist(), cut[kept].tolist(), strict=True
        )
    ]


def in_batches(
    images: Sequence[Image.Image],
    classes: Sequence[list[str]],
    batch_size: int,
    detect: Callable[[list[Image.Image], list[list[str]]], list[list[Box]]],
) -> list[list[Box]]:
    """The boxes of each image by a `detect` that takes images with equally many classes."""
    found: list[list[Box]] = [[] for _ in images]
    for batch in by_number_of_classes(classes, batch_size):
        boxes = detect([images[i] for i in batch], [classes[i] for i in batch])
        for place, some in zip(batch, boxes, strict=True):
            found[place] = some
    return found


def by_number_of_classes(classes: Sequence[Sequence[str]], batch_size: int) -> list[list[int]]:
    """Batches of image indices with equally many queried classes; images with none are skipped."""
    groups: dict[int, list[int]] = {}
    for place, names in enumerate(classes):
        if names:
            groups.setdefault(len(names), []).append(place)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def distinct(images: Sequence[object], classes: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each image's classes without repeats; ValueError unless there is one list of classes per image."""
    if len(images) != len(classes):
        raise ValueError(f"{len(images)} images but {len(classes)} lists of classes: each image has its own")
    return [list(dict.fromkeys(names)) for names in classes]
