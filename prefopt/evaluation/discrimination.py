"""How well a discriminator tells real from generated images, and how far its probabilities can be trusted."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.special import expit
from scipy.stats import spearmanr

from prefopt.evaluation.stats import pairwise_accuracy

BINS = 10


def discrimination(logits: np.ndarray, ranks: np.ndarray) -> dict[str, Any]:
    """Figures of logits (n, k) of n lists with ranks (n, k): 1 is real, 0 is an empty place.

    `accuracy`: how often the real image has the higher logit of a real and a generated one of one list, with
    an interval that resamples lists. `spearman`: the mean rank correlation of logits and the order of the
    list, of those of three or more. `calibration_error`: the mean distance between the probability of 'real'
    and the share that is, over ten equal bins, both classes weighed alike.
    """
    there, groups = ranks > 0, np.broadcast_to(np.arange(len(ranks))[:, None], ranks.shape)
    accuracy = pairwise_accuracy(logits[there], ranks[there] == 1, groups[there])
    lists = [(row[real], -rank[real]) for row, rank, real in zip(logits, ranks, there, strict=True)]
    found: list[Any] = [spearmanr(*both) for both in lists if len(both[0]) > 2 and np.ptp(both[0])]
    orders = [one.statistic for one in found]
    return {
        "lists": len(ranks),
        "accuracy": accuracy and {"mean": accuracy[0].mean, "low": accuracy[0].low, "high": accuracy[0].high},
        "spearman": float(np.mean(orders)) if orders else None,
        "calibration_error": calibration_error(expit(logits[there]), ranks[there] == 1),
    }


def draw_strips(
    path: Path,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    logits: np.ndarray,
    ranks: np.ndarray,
) -> None:
    """Draw each list's images in the order of their logits (n, k), the highest first, to a PNG.

    Above each are its rank in the list (1 is real) and its logit; the real one has a frame.
    """
    rows, columns = ranks.shape
    figure = Figure(figsize=(1.5 * columns, 2.1 * rows), layout="constrained")
    for row, strip in enumerate(figure.subfigures(rows, 1, squeeze=False)[:, 0]):
        prompt = textwrap.shorten(prompts[row], 22 * columns, placeholder=" ...")
        strip.suptitle(prompt, x=0.02, ha="left", fontsize=8, parse_math=False)
        there = np.flatnonzero(ranks[row])
        order = there[np.argsort(-logits[row, there], kind="stable")]
        axes = strip.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        for axis, place in zip(axes, order, strict=False):
            real = ranks[row, place] == 1
            axis.imshow(images[row][place])
            name = "real" if real else f"rank {ranks[row, place]}"
            axis.set_title(f"{name}  {logits[row, place]:+.1f}", fontsize=8)
            if real:
                frame = axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False))
                frame.set(edgecolor="tab:green", linewidth=3, clip_on=False)
    figure.savefig(path, dpi=110)


def calibration_error(probabilities: np.ndarray, real: np.ndarray) -> float:
    """The expected calibration error of probabilities (n,), with both classes at the same weight."""
    weights = np.where(real, 0.5 / max(real.sum(), 1), 0.5 / max((~real).sum(), 1))
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = [abs(float((weights * (probabilities - real))[bins == place].sum())) for place in range(BINS)]
    return sum(gaps)
