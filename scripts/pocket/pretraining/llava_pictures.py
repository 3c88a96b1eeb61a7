"""Sound and flawed pictures for the LLaVA, half of them as the VAE draws them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.pocket.world import Scene
from pretraining.common import to_tensor
from pretraining.flaws import FLAWS, PARTS, possible, render_flawed, render_parts
from pretraining.pictures import copy_through

SHARE_COPIED = 0.5
_LATENT_NOISE = 0.15
_SOUND = 3  # as often as any one flaw
_CHUNK = 100
# What is to be found patch by patch: parts, and flaws that every patch of a picture has.
FINDINGS = (*PARTS, "noise", "blur", "darkness")
_FEWEST = 3  # pixels of a part in a patch


@dataclass
class FlawedPictures:
    """Pictures with the scene and the flaw that they were drawn with."""

    scenes: list[Scene]
    flaws: list[str]
    copied: list[bool]  # through the VAE
    pixels: Tensor  # (n, 3, 64, 64) uint8
    found: Tensor  # (n, 8, 8, findings) bool, of each patch

    def values(self, items: np.ndarray) -> Tensor:
        """(len(items), 3, 64, 64) float32 in -1..1, as the processor makes them."""
        return self.pixels[torch.from_numpy(items)].float().div(127.5).sub(1)


def draw_flaw(rng: np.random.Generator, scene: Scene) -> str:
    """A flaw that the scene can have; `none` three times as often as any other."""
    names = [name for name in FLAWS if possible(scene, name)]
    return str(rng.choice([*names, *["none"] * (_SOUND - 1)]))


def _find(scene: Scene, flaw: str, seed: int) -> np.ndarray:
    patches = render_parts(scene, flaw, seed).reshape(8, 8, 8, 8).swapaxes(1, 2)  # rows, columns, within
    counts = np.stack([(patches == part).sum((2, 3)) for part in range(len(PARTS))], axis=-1)
    everywhere = np.broadcast_to([flaw == name for name in FINDINGS[len(PARTS) :]], (8, 8, 3))
    return np.concatenate([counts >= _FEWEST, everywhere], axis=-1)


def make_pictures(seed: int, size: int, vae: Any, scenes: list[Scene]) -> FlawedPictures:
    """`size` pictures (a multiple of 100) of scenes drawn at random, half of them the VAE's copies.

    Copies carry latent noise of up to 0.15 deviations, as generated pictures do; their flaws are those drawn.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2**31])
    made = FlawedPictures(
        [],
        [],
        [],
        torch.empty(size, 3, 64, 64, dtype=torch.uint8),
        torch.empty(size, 8, 8, len(FINDINGS), dtype=torch.bool),
    )
    for start in range(0, size, _CHUNK):
        shown = [scenes[i] for i in rng.integers(len(scenes), size=_CHUNK)]
        flaws = [draw_flaw(rng, scene) for scene in shown]
        seeds = rng.integers(2**31, size=_CHUNK).tolist()
        pixels = to_tensor([render_flawed(*item) for item in zip(shown, flaws, seeds, strict=True)])
        copied = torch.from_numpy(rng.random(_CHUNK) < SHARE_COPIED)
        pixels[copied] = copy_through(vae, pixels[copied], _LATENT_NOISE * float(rng.random()))
        made.pixels[start : start + _CHUNK] = pixels.add(1).mul(127.5).round().byte()
        items = zip(shown, flaws, seeds, strict=True)
        made.found[start : start + _CHUNK] = torch.from_numpy(np.stack([_find(*item) for item in items]))
        made.scenes += shown
        made.flaws += flaws
        made.copied += copied.tolist()
    return made
