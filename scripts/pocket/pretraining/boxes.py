"""Where each animal of a picture is: the truth that the pocket's detector learns, and how it is measured."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from prefopt.detectors import Box
from prefopt.pocket.drawing import OUTLINE, Pen, draw_animal, set_stage
from prefopt.pocket.scenery import CANVAS
from prefopt.pocket.world import SIZE, Scene


def boxes(scene: Scene, seed: int) -> list[Box]:
    """A box of confidence 1 around each animal of `render(scene, seed)`, hidden parts included.

    In pixels of the 64 x 64 picture, in fractions of 1/4; the farthest animal first.
    """
    stage = set_stage(scene.colour, scene.count, scene.place, np.random.default_rng([seed, scene.index()]))
    found = []
    for figure in stage.figures:
        mask = Image.new("L", (CANVAS, CANVAS))
        draw = ImageDraw.Draw(mask)

        def silhouette(_, x, ground, unit, facing, *__, draw=draw):
            return Pen(draw, x, ground, unit, facing, OUTLINE, 255)

        draw_animal(ImageDraw.Draw(stage.picture), scene.animal, figure, stage, silhouette)
        found.append(
            Box(scene.animal, 1.0, *(edge * SIZE / CANVAS for edge in mask.getbbox() or (0, 0, 0, 0)))
        )
    return found


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0..1, whatever the labels."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box.right - box.left) * (box.bottom - box.top) for box in (a, b))
    return shared / (areas - shared) if shared else 0.0


def average_precision(
    found: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], label: str, threshold: float = 0.5
) -> float:
    """The area under the precision-recall curve of one label over all images, 0..1; NaN without such truth.

    Each found box, the most confident first, takes the true box of its image that it overlaps most, unless
    it is taken; precision is made monotone and the area is exact (Pascal VOC since 2010, arXiv 1405.0312).
    """
    wanted = [[box for box in image if box.label == label] for image in truth]
    ranked = sorted(
        ((box, image) for image, some in enumerate(found) for box in some if box.label == label),
        key=lambda pair: -pair[0].confidence,
    )
    taken: set[tuple[int, int]] = set()
    hits = np.zeros(len(ranked))
    for place, (box, image) in enumerate(ranked):
        free = [i for i in range(len(wanted[image])) if (image, i) not in taken]
        best = max(free, key=lambda i: overlap(box, wanted[image][i]), default=None)
        if best is not None and overlap(box, wanted[image][best]) >= threshold:
            taken.add((image, best))
            hits[place] = 1
    total = sum(map(len, wanted))
    if not total:
        return float("nan")
    right = np.cumsum(hits)
    precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((precision * hits).sum() / total)


def mean_average_precision(found: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]]) -> float:
    """mAP50: the mean over the labels of `truth` of `average_precision` at an overlap of 0.5."""
    labels = sorted({box.label for image in truth for box in image})
    return float(np.mean([average_precision(found, truth, label) for label in labels]))
