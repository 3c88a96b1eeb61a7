"""How well a discriminator tells real from generated images, and how far its probabilities can be trusted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import expit
from scipy.stats import spearmanr

from prefopt.evaluation.stats import pairwise_accuracy
from prefopt.strips import Picture

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


def ordered_strip(images: Sequence[Image.Image], logits: np.ndarray, ranks: np.ndarray) -> list[Picture]:
    """A list's images by their logits (k,), the highest first; the real one, rank 1, has a frame."""
    there = np.flatnonzero(ranks)
    return [
        Picture(
            f"{'real' if ranks[place] == 1 else f'rank {ranks[place]}'}  {logits[place]:+.1f}",
            images[place],
            framed=bool(ranks[place] == 1),
        )
        for place in there[np.argsort(-logits[there], kind="stable")]
    ]


def calibration_error(probabilities: np.ndarray, real: np.ndarray) -> float:
    """The expected calibration error of probabilities (n,), with both classes at the same weight."""
    weights = np.where(real, 0.5 / max(real.sum(), 1), 0.5 / max((~real).sum(), 1))
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = [abs(float((weights * (probabilities - real))[bins == place].sum())) for place in range(BINS)]
    return sum(gaps)
