"""A trained discriminator as a reward model: the logit of 'real' for an image and its text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from prefopt import pocket
from prefopt.diffusion.discriminator import load_discriminator
from prefopt.diffusion.families import family_of
from prefopt.diffusion.latents import prepare_picture
from prefopt.diffusion.sampling import load_pipeline
from prefopt.files import content_key
from prefopt.loading import files_identity


class DiscriminatorScorer:
    """Scores images against their prompts with a discriminator of a folder, a hub id or `pocket`.

    Images are encoded by the VAE, prompts by the text encoder of the model that its config.json names; if
    these are others now than it was trained on, that is an InputError.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ):
        name = model_name_or_path
        config: Any = load_discriminator(name, revision=revision).config
        self.pipeline = load_pipeline(
            config["base_model"], revision=config["base_revision"], variant=config["base_variant"]
        )
        model: Any = load_discriminator(name, self.pipeline, revision)
        self.model = model.eval().to(device)
        self.family, self.batch_size = family_of(self.pipeline), batch_size
        network: Any = self.family.network(self.pipeline)
        self.resolution = network.config["sample_size"] * self.pipeline.vae_scale_factor
        setattr(self.pipeline, self.family.component, None)  # it generates nothing
        self.pipeline.to(device)

    @torch.no_grad()
    def rewards(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Rewards (n,) in logits of n images, each for the prompt at its place."""
        (shift, factor), vae = self.family.scaling(self.pipeline), self.pipeline.vae
        rewards = np.empty(len(images))
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            pixels = torch.stack([prepare_picture(image, self.resolution).pixels for image in images[batch]])
            latents = (vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean - shift) * factor
            text = self.family.encode_prompts(self.pipeline, list(prompts[batch]))["embeddings"]
            rewards[batch] = self.model(latents.float(), text.float()).double().cpu().numpy()
        return rewards


def discriminator_identity(model_name_or_path: str) -> str:
    """What the logits depend on, from the model's files: nothing is loaded."""
    name = pocket.resolve(str(model_name_or_path), "discriminator")
    return content_key(f"discriminator {files_identity(name)}")
