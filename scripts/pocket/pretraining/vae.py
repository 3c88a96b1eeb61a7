"""Trains the pocket's AutoencoderKL: 64 x 64 pictures to 4 x 16 x 16 latents and back.

Left out: a perceptual network and a discriminator. On flat drawings with outlines, the absolute error of the
pixels and of their differences (edges) is enough for sharp pictures.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from prefopt.pocket.world import render, silhouette
from pretraining.common import Run, Training, fresh_batch, fresh_items, to_tensor

CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (24, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 64,
    "mid_block_add_attention": False,
}
_KL_WEIGHT = 3e-4
_ANIMAL_WEIGHT = 3.0


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(pixels: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean absolute error of the pixels plus that of their vertical and horizontal differences.

    `weight` is (n, 1, height, width).
    """
    loss = (weight * (pixels - decoded).abs()).mean()
    corners = (weight[..., 1:, :], weight[..., :, 1:])
    for w, a, b in zip(corners, _edges(pixels), _edges(decoded), strict=True):
        loss = loss + (w * (a - b).abs()).mean()
    return loss


def _batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their pixels' weights: an animal's pixels count four times those of the scenery."""
    items = fresh_items(rng, size)
    pixels = to_tensor([render(*item) for item in items]).contiguous(memory_format=torch.channels_last)
    masks = np.stack([np.asarray(silhouette(*item)) for item in items])
    return pixels, 1 + _ANIMAL_WEIGHT / 255 * torch.from_numpy(masks)[:, None].float()


def train(run: Run) -> AutoencoderKL:
    """The trained VAE in float32, its scaling factor measured on training pictures."""
    torch.manual_seed(run.seed)
    vae: Any = AutoencoderKL(**CONFIG)
    vae.to(memory_format=torch.channels_last)
    training = Training(run, torch.nn.ModuleDict({"vae": vae}))
    for rng in training.batches():
        pixels, weight = _batch(rng, run.batch)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error = reconstruction_loss(pixels, decoded, weight)
        training.update(error + _KL_WEIGHT * kl, pixels=(pixels - decoded).abs().mean().item(), kl=kl.item())
    training.finished()
    with torch.no_grad():
        _, images = fresh_batch(training.generator(run.steps), 256)
        latents = vae.encode(to_tensor(images)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae
