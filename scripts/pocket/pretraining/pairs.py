"""Makes the pocket's pairs table: the pocket model's own candidates, best against worst by its CLIP."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.judges.clip import ClipScorer
from prefopt.pocket.world import PHRASINGS, caption, train_scenes
from pretraining.text_to_image import SAMPLING

_CANDIDATES = 8
_FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "chosen": datasets.Image(),
        "rejected": datasets.Image(),
        "margin": datasets.Value("float32"),
    }
)


def make_pairs(path: Path, seed: int, size: int) -> dict[str, float]:
    """Write `size` pairs to `path`/train.parquet; returns mean margin and scores, in CLIP score points."""
    rng = np.random.default_rng([seed, 0])
    scenes = train_scenes()
    order = [scenes[i] for _ in range(size // len(scenes) + 1) for i in rng.permutation(len(scenes))][:size]
    prompts = [caption(scene, int(rng.integers(PHRASINGS))) for scene in order]
    pipeline, scorer = load_pipeline("pocket"), ClipScorer("pocket")
    every = [prompt for prompt in prompts for _ in range(_CANDIDATES)]
    seeds = [int(s) for s in rng.choice(2**31, size=len(every), replace=False)]
    images = list(sample(pipeline, every, seeds, Sampler(**SAMPLING), batch_size=64))
    scores = scorer(images, every).reshape(size, _CANDIDATES)
    rows: dict[str, list] = {name: [] for name in _FEATURES}
    for i, prompt in enumerate(prompts):
        best, worst = int(scores[i].argmax()), int(scores[i].argmin())
        rows["prompt"].append(prompt)
        rows["chosen"].append(_encoded(images[i * _CANDIDATES + best]))
        rows["rejected"].append(_encoded(images[i * _CANDIDATES + worst]))
        rows["margin"].append(float(scores[i, best] - scores[i, worst]))
    path.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=_FEATURES).to_parquet(path / "train.parquet")
    return {
        "mean_margin": float(np.mean(rows["margin"])),
        "mean_score_chosen": float(scores.max(1).mean()),
        "mean_score_rejected": float(scores.min(1).mean()),
    }


def _encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, quality=100, method=6)
    return {"bytes": buffer.getvalue(), "path": None}
