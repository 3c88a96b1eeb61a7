"""Training a discriminator: tables of real and generated images, its penalty, its calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prefopt.config import PreferenceConfig
from prefopt.diffusion.candidates import EncodedCandidates, encode_candidates
from prefopt.diffusion.config import ImageArguments
from prefopt.diffusion.discriminator import Discriminator, latents_identity
from prefopt.diffusion.families import family_of
from prefopt.diffusion.sampling import load_pipeline
from prefopt.diffusion.tables import Table
from prefopt.diffusion.training import chances_of, encoder_of, free
from prefopt.losses import discriminator_loss
from prefopt.objectives import Scored, discriminating
from prefopt.trainer import PreferenceTrainer

STEP = 0.01  # of the difference that stands for a gradient, in standard deviations of normalised latents


class DiscriminatorScore:
    """A discriminator's logits of a batch's clean latents, as scores; with `r1_gamma` its penalty, too."""

    def __init__(self, r1_gamma: float | None = None):
        self.r1_gamma = r1_gamma
        self.extras = frozenset() if r1_gamma is None else frozenset({"penalty"})

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Scored:
        """Logits (batch, k); the penalty (batch,) is r1_gamma / 2 times the squared gradient at real latents,
        arXiv 1801.04406 eq. 9, taken from the difference that a little of the draw's noise makes (arXiv
        2501.08316, section 3.3): its mean over noises is the same, without a second derivative."""
        latents, _ranks = batch["latents"].float(), batch["ranks"]
        text = batch["conditioning"]["embeddings"].float()
        if self.r1_gamma is not None:
            latents = torch.cat([latents, latents[:, :1] + STEP * batch["noise"][:, None]], dim=1)
        candidates = latents.shape[1]
        logits = model(latents.flatten(0, 1), text.repeat_interleave(candidates, dim=0)).view(-1, candidates)
        if self.r1_gamma is None:
            return Scored(logits)
        slope = (logits[:, -1] - logits[:, 0]) / STEP
        return Scored(logits[:, :-1], penalty=0.5 * self.r1_gamma * slope.square())


def train_discriminator(
    config: PreferenceConfig,
    images: ImageArguments,
    tables: tuple[Table, Table],
    *,
    widths: Sequence[int],
    spectral: bool,
    r1_gamma: float | None,
    revision: str | None = None,
) -> tuple[PreferenceTrainer, EncodedCandidates]:
    """Encode both tables and train on the first; the trainer, and the second's encoded examples.

    `revision` is that of the model that `images` names, whose latents are read.
    """
    pipeline = load_pipeline(images.model_name_or_path, revision=revision, variant=images.variant)
    family = family_of(pipeline)
    encoder, chances = encoder_of(config, images, pipeline, family), chances_of(config, images)
    examples, held_out = (encode_candidates(encoder, table, **chances) for table in tables)
    first = examples[0, 0]
    torch.manual_seed(config.seed)
    latents = latents_identity(pipeline, family)
    model = Discriminator(
        first["latents"].shape[1],
        first["conditioning"]["embeddings"].shape[-1],
        widths,
        spectral=spectral,
        latents=latents,
        base_model=images.model_name_or_path,
        base_revision=revision,
        base_variant=images.variant,
    )
    free(pipeline, family)
    trainer = PreferenceTrainer(
        model,
        config,
        score=DiscriminatorScore(r1_gamma),
        objective=discriminating(),
        train_dataset=examples,
        made_of={"rows (SHA-256)": tables[0].key(), "latents": latents},
        about={"loss": "softplus(-d) of images of rank 1 and softplus(d) of the others, half each"},
    )
    trainer.train()
    return trainer, held_out


@torch.no_grad()
def logits_of(model: nn.Module, examples: EncodedCandidates, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """A discriminator's logits of all examples and their ranks, (n, k) on the CPU."""
    score, device = DiscriminatorScore(), next(model.parameters()).device
    items: Sequence[tuple[int, int]] = [(index, 0) for index in range(len(examples))]
    loader = DataLoader(examples, sampler=items, batch_size=batch_size)
    logits, ranks = [], []
    for batch in loader:
        inputs = {name: batch[name].to(device) for name in ("latents", "ranks")}
        text = batch["conditioning"]["embeddings"].to(device)
        logits.append(score(model, inputs | {"conditioning": {"embeddings": text}}).scores.cpu())
        ranks.append(batch["ranks"])
    return torch.cat(logits), torch.cat(ranks)


def calibrate(model: Discriminator, logits: Tensor, ranks: Tensor) -> None:
    """Scale and shift the model's logits so that they cost least on these, (n, k); after Platt (1999).

    Real and generated images count half each, as in training.
    """

    def cost(values: Any) -> float:
        scaled = float(values[0]) * logits.double() + float(values[1])
        return discriminator_loss(scaled, ranks == 1, ranks > 0).mean().item()

    scale, shift = minimize(cost, [1.0, 0.0], method="Nelder-Mead").x.tolist()
    before = model.config["scale"], model.config["shift"]
    model.register_to_config(scale=scale * before[0], shift=scale * before[1] + shift)
