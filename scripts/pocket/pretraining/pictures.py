"""Pictures for the judges' trainings: renders, the VAE's copies of them, and what may spoil either."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import interpolate, pad

from prefopt.pocket.world import Scene
from pretraining.common import fresh_batch, to_tensor

_LATENT_NOISE = 0.25


@dataclass
class Pool:
    """Training scenes with a render of each and the VAE's copy of it."""

    scenes: list[Scene]
    renders: Tensor  # (n, 3, 64, 64) uint8
    copies: Tensor  # (n, 3, 64, 64) uint8

    def draw(self, rng: np.random.Generator, items: np.ndarray) -> Tensor:
        """(len(items), 3, 64, 64) float32 in -1..1: half of them copies, all of them augmented."""
        picked = torch.from_numpy(items)
        copied = torch.from_numpy(rng.random(len(items)) < 0.5)[:, None, None, None]
        pixels = torch.where(copied, self.copies[picked], self.renders[picked]).float().div(127.5).sub(1)
        return augment(pixels, rng)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().byte()


@torch.no_grad()
def copy_through(vae: Any, pixels: Tensor, noise: float = 0.0) -> Tensor:
    """Encoded and decoded, with `noise` on the latents, in units of their deviation, as a sampler errs."""
    latents = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
    latents = latents + noise / vae.config.scaling_factor * torch.randn_like(latents)
    return vae.decode(latents).sample.clamp(-1, 1)


def make_pool(seed: int, size: int, vae: AutoencoderKL) -> Pool:
    """`size` renders of training scenes, a multiple of 100, and copies with latent noise of up to 0.25."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2**31])
    pool = Pool(
        [], torch.empty(size, 3, 64, 64, dtype=torch.uint8), torch.empty(size, 3, 64, 64, dtype=torch.uint8)
    )
    for start in range(0, size, 100):
        scenes, images = fresh_batch(rng, 100)
        pixels = to_tensor(images)
        pool.scenes += scenes
        pool.renders[start : start + 100] = _bytes(pixels)
        pool.copies[start : start + 100] = _bytes(copy_through(vae, pixels, _LATENT_NOISE * rng.random()))
    return pool


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirrored, shifted by up to 4 pixels, shaded, blurred, noised, each by its own luck; words stay true."""
    n = len(pixels)

    def chance(share: float) -> Tensor:
        return torch.from_numpy(rng.random(n) < share)[:, None, None, None]

    pixels = torch.where(chance(0.5), pixels.flip(-1), pixels)
    padded = pad(pixels, (4, 4, 4, 4), mode="replicate")
    shifts = rng.integers(0, 9, size=(n, 2))
    pixels = torch.stack([p[:, y : y + 64, x : x + 64] for p, (y, x) in zip(padded, shifts, strict=True)])
    blurred = interpolate(
        interpolate(pixels, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear"
    )
    pixels = torch.where(chance(0.3), blurred, pixels)
    contrast = torch.from_numpy(rng.uniform(0.85, 1.1, size=(n, 1, 1, 1)).astype(np.float32))
    brightness = torch.from_numpy(rng.uniform(-0.08, 0.08, size=(n, 3, 1, 1)).astype(np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.15, size=(n, 1, 1, 1)).astype(np.float32)) * chance(0.5)
    return (pixels * contrast + brightness + strength * torch.randn_like(pixels)).clamp(-1, 1)
