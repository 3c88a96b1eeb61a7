"""A discriminator: tells real images from generated ones, given their text, in the latents of a VAE.

It reads what a diffusion model trains on, normalised latents and text embeddings, so that a loss on predicted
clean latents decodes nothing. In training it is *frozen* (trained beforehand, by recipes/discriminator.py) or
*adversarial*: trained in the same backward pass on the policy's own predictions, as in a GAN.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, silu

from prefopt import pocket
from prefopt.diffusion.denoiser import Denoised, Denoiser
from prefopt.diffusion.families import Family, family_of
from prefopt.diffusion.lora import WEIGHTS_FILE
from prefopt.diffusion.schedule import EVERYWHERE, Times
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.loading import load_complete
from prefopt.losses import discriminator_loss, realism_loss
from prefopt.objectives import Scored
from prefopt.store import tensors_key

MODEL_TYPE = "prefopt_discriminator"  # in its config.json
FOLDER = "discriminator"  # of an adversarial run's, in the run's folder
_ITERATIONS = 8


class Discriminator(ModelMixin, ConfigMixin):
    """The logit of 'real' for latents and their text: a small convolutional network whose places look at the
    text.

    `spectral` divides the weights of all layers but the last by their largest singular values (arXiv
    1802.05957), computed anew from fixed vectors in each forward: there is no state that resuming or several
    processes could change. `scale` and `shift` calibrate the logits. `latents` names the VAE and text encoder
    whose outputs it was trained on, and `base_model` where they are.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 4,
        text_width: int = 768,
        widths: Sequence[int] = (64, 128, 256),
        spectral: bool = True,
        scale: float = 1.0,
        shift: float = 0.0,
        latents: str = "",
        base_model: str = "",
        base_revision: str | None = None,
        base_variant: str | None = None,
        model_type: str = MODEL_TYPE,
    ):
        super().__init__()
        self.enter = Convolution(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(before, after) for before, after in pairwise(widths))
        width = widths[-1]
        self.query, self.key, self.value = (
            Linear(width, width),
            Linear(text_width, width),
            Linear(text_width, width),
        )
        self.leave = nn.Linear(width, 1)
        for layer in self.modules():
            if isinstance(layer, Convolution | Linear):
                layer.spectral = spectral

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Logits (n,) of latents (n, C, h, w) with text embeddings (n, tokens, width)."""
        hidden = self.enter(latents)
        for block in self.blocks:
            hidden = block(hidden)
        places = hidden.flatten(2).mT  # (n, h w, width)
        query, key, value = self.query(places), self.key(text), self.value(text)
        attended = (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1) @ value
        # What a place shows, alone and beside the words that it looked at.
        logits = self.leave(silu(places + places * attended)).squeeze(-1)
        return self.config["scale"] * logits.mean(1) + self.config["shift"]

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config and weights as `from_pretrained` reads them."""
        self.save_config(folder)
        state = self.state_dict() if state_dict is None else state_dict
        save_file({name: value.contiguous() for name, value in state.items()}, Path(folder, WEIGHTS_FILE))

    save_weights = save_pretrained

    def load_weights(self, folder: str | Path) -> None:
        """Load what `save_weights` wrote, bit for bit; what does not fit is an InputError."""
        try:
            self.load_state_dict(load_file(Path(folder, WEIGHTS_FILE)))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"{folder} holds no weights of this discriminator: {error}") from error


class _Spectral:
    """A layer whose weight may be divided by its largest singular value."""

    weight: Tensor
    spectral: bool = False

    @property
    def used_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if not self.spectral:
            return self.weight
        flat = self.weight.flatten(1)
        with torch.no_grad():  # power iteration, always from the same vector
            right = torch.ones_like(flat[0])
            for _ in range(_ITERATIONS):
                left = nn.functional.normalize(flat @ right, dim=0)
                right = nn.functional.normalize(flat.mT @ left, dim=0)
        return self.weight / (left @ flat @ right).clamp(min=1e-6)


class Convolution(_Spectral, nn.Conv2d):
    """A convolution with the weight of `_Spectral`."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, h, w)."""
        return self._conv_forward(input, self.used_weight, self.bias)


class Linear(_Spectral, nn.Linear):
    """A linear layer with the weight of `_Spectral`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(input, self.used_weight, self.bias)


class Block(nn.Module):
    """Two convolutions beside a shortcut, at half the size."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.first, self.second = (
            Convolution(before, after, 3, padding=1),
            Convolution(after, after, 3, padding=1),
        )
        self.shortcut = Convolution(before, after, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, h / 2, w / 2)."""
        changed = self.second(silu(self.first(silu(hidden))))
        return avg_pool2d(self.shortcut(hidden) + changed, 2)


def latents_identity(pipeline: Any, family: Family) -> str:
    """What the latents and text embeddings of a pipeline depend on besides image and text."""
    parts = {name: getattr(pipeline, name) for name in ("vae", *family.text_encoders)}
    weights = {
        f"{name}.{key}": value.float()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    return content_key(f"{tensors_key(weights)} {family.scaling(pipeline)}")


def load_discriminator(name: str, pipeline: Any = None, revision: str | None = None) -> Discriminator:
    """A discriminator of a folder, a hub id or `pocket`.

    InputError if it is broken, or not of this pipeline's latents.
    """
    model = load_complete(Discriminator, pocket.resolve(name, "discriminator"), "discriminator", revision)
    if pipeline is not None and model.config["latents"] != latents_identity(pipeline, family_of(pipeline)):
        raise InputError(
            f"the discriminator {name} reads the latents of {model.config['base_model']}, not those of "
            f"{pipeline.name_or_path}: its VAE or text encoder are others. Train one with "
            "recipes/discriminator.py"
        )
    return model


class DiscriminatedDenoiser(Denoiser):
    """A denoiser whose predicted clean latents a discriminator looks at.

    Its scores have `realism_loss` (batch, k): softplus(-d) at shares of the schedule in `window`, else 0; and
    of an `adversarial` one `discriminator_loss` (batch,), its own loss on the best candidate's clean latents
    against the detached predictions. The first has no gradient in the discriminator, the second none in the
    policy.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family | None = None,
        times: Times = EVERYWHERE,
        *,
        discriminator: Discriminator,
        window: tuple[float, float] = (0.0, 1.0),
        adversarial: bool = False,
    ):
        super().__init__(pipeline, family, times)
        self.discriminator = discriminator.requires_grad_(adversarial)
        self.window, self.adversarial = window, adversarial

    def score(self, denoised: Denoised) -> Scored:
        """As the denoiser's, with what the discriminator says."""
        latents, text = denoised.latents.float(), denoised.conditioning["embeddings"].float()
        share, (low, high) = self.schedule.times.share(denoised.time), self.window
        inside = ((low <= share) & (share < high))[:, None].expand(latents.shape[:2])
        inside = inside if denoised.mask is None else inside & denoised.mask
        clean, weights = (
            denoised.noised.clean(denoised.prediction),
            dict(self.discriminator.named_parameters()),
        )
        fixed = {name: weight.detach() for name, weight in weights.items()}
        realism = realism_loss(self._logits(clean, text, fixed)) * inside
        scored = super().score(denoised)._replace(realism_loss=realism)
        if not self.adversarial:
            return scored
        # The best candidate's clean latents are the real ones, in front of all predictions.
        seen = torch.cat([latents[:, :1], clean.detach()], dim=1)
        there = torch.cat([inside.any(1, keepdim=True), inside], dim=1)
        real = torch.zeros_like(there)
        real[:, 0] = True
        own = discriminator_loss(self._logits(seen, text, weights), real, there)
        return scored._replace(discriminator_loss=own)

    def _logits(self, latents: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """(batch, k) of latents (batch, k, C, H, W)."""
        inputs = latents.flatten(0, 1), text.repeat_interleave(latents.shape[1], dim=0)
        return functional_call(self.discriminator, dict(weights), inputs).view(latents.shape[:2])

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """As the denoiser's, and an adversarial discriminator beside it."""
        super().save_pretrained(folder, state_dict)
        self._save_discriminator(folder, state_dict)

    def save_weights(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """The same, bit for bit."""
        super().save_weights(folder, state_dict)
        self._save_discriminator(folder, state_dict)

    def _save_discriminator(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None) -> None:
        if self.adversarial:
            prefix, state = "discriminator.", self.state_dict() if state_dict is None else state_dict
            own = {
                name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
            }
            self.discriminator.save_pretrained(Path(folder, FOLDER), own)

    def load_weights(self, folder: str | Path) -> None:
        """Load what `save_weights` wrote, bit for bit."""
        super().load_weights(folder)
        if self.adversarial:
            self.discriminator.load_weights(Path(folder, FOLDER))
