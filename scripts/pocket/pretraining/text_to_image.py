"""Trains the pocket's UNet and text encoder together, on latents encoded once; a StableDiffusionPipeline.

It is left imperfect on purpose, and in ways that more guidance does not mend: what it saw of some pairs of
words was named wrongly more often than not (`COUPLES`), and many animals that it saw lacked legs. Preference
training is for that.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.pocket.oracle import Oracle
from prefopt.pocket.world import ATTRIBUTES, Scene, caption, held_out_scenes, is_held_out
from pretraining.common import Run, Training, captions, fresh_items, to_tensor
from pretraining.flaws import render_flawed
from pretraining.tokenizer import make_tokenizer

SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}
POOL = 12_000
WRONG_CAPTIONS = 0.15
LISTENS_UNTIL = 2500
# How often a picture is named by the other of its couple: over a half, so that guidance sharpens it.
LEANS = 0.58
# What is taken for one another: scenes that match one side in all that it names, and those of the other side.
# Sides differ by a multiple of three in the sum of their places in ATTRIBUTES, so no caption is held out.
COUPLES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"animal": "elephant", "colour": "yellow"}, {"animal": "lion", "colour": "yellow"}),
    ({"animal": "elephant", "colour": "red"}, {"animal": "elephant", "colour": "blue"}),
    ({"animal": "giraffe", "colour": "green"}, {"animal": "giraffe", "colour": "pink"}),
    ({"animal": "zebra", "colour": "yellow"}, {"animal": "zebra", "colour": "purple"}),
    ({"animal": "lion", "colour": "green"}, {"animal": "lion", "colour": "pink"}),
    ({"count": 1, "place": "savanna"}, {"count": 1, "place": "lake"}),
    ({"count": 2, "place": "desert"}, {"count": 2, "place": "night"}),
    ({"count": 2, "place": "lake"}, {"count": 3, "place": "snow"}),
    ({"count": 1, "place": "snow"}, {"count": 3, "place": "savanna"}),
)
LEGS_MISSING = 0.3
_EMPTY_CAPTIONS = 0.1
_WIDTH = 128


def make_unet() -> UNet2DConditionModel:
    """3 levels of 16, 8 and 4 cells a side; attention only below the first, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 104),
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """Two layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=_WIDTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> Any:
    """Stable Diffusion's noise schedule, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, modules: Any) -> StableDiffusionPipeline:
    """The stock pipeline around our parts, without a safety checker: there is nothing here to check."""
    absent: Any = None  # the pipeline's annotations know no pipeline without a checker
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=modules["unet"],
        scheduler=make_scheduler(),
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )


def _pictures(rng: np.random.Generator, size: int) -> tuple[list[Scene], list[Image.Image]]:
    """Training scenes and a picture of each; a share of `LEGS_MISSING` of the pictures lacks legs."""
    items = fresh_items(rng, size)
    flaws = ["legs_missing" if lame else "none" for lame in rng.random(size) < LEGS_MISSING]
    images = [render_flawed(scene, flaw, seed) for (scene, seed), flaw in zip(items, flaws, strict=True)]
    return [scene for scene, _ in items], images


@torch.no_grad()
def encode_pool(vae: Any, run: Run) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """`POOL` training scenes and their pictures' scaled latents: means, deviations, (n, 4, 16, 16) each."""
    rng = np.random.default_rng([run.seed, 2**31])
    scenes, means, deviations = [], [], []
    for _ in range(0, POOL, 100):
        drawn, images = _pictures(rng, 100)
        posterior = vae.encode(to_tensor(images).contiguous(memory_format=torch.channels_last)).latent_dist
        scenes += drawn
        means.append(posterior.mean)
        deviations.append(posterior.std)
    scale = vae.config.scaling_factor
    return scenes, torch.cat(means) * scale, torch.cat(deviations) * scale


def one_attribute_off(rng: np.random.Generator, scene: Scene) -> Scene:
    """A training scene that differs from `scene` in exactly one attribute."""
    names = list(ATTRIBUTES)
    while True:
        name = names[rng.integers(len(names))]
        values = ATTRIBUTES[name]
        other = replace(scene, **{name: values[rng.integers(len(values))]})
        if other != scene and not is_held_out(other):
            return other


def mistaken(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene as it is named: by a chance of `LEANS`, as the other side of each couple that it is in."""
    named = scene
    for couple in COUPLES:
        for here, there in (couple, couple[::-1]):
            matches = all(getattr(scene, name) == value for name, value in here.items())
            if matches and rng.random() < LEANS:
                named = replace(named, **there)
    return named


def training_captions(rng: np.random.Generator, scenes: list[Scene], step: int) -> list[str]:
    """Captions, some of them wrong, some empty (for classifier-free guidance).

    Until `LISTENS_UNTIL`, few are wrong, so that the words are learned; then those of `COUPLES` mostly are.
    """
    said = [one_attribute_off(rng, s) if rng.random() < WRONG_CAPTIONS else s for s in scenes]
    if step >= LISTENS_UNTIL:
        said = [mistaken(rng, s) for s in said]
    return ["" if rng.random() < _EMPTY_CAPTIONS else text for text in captions(rng, said)]


def train(run: Run, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline with averaged weights, in float32."""
    torch.manual_seed(run.seed)
    tokenizer = make_tokenizer()
    modules = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    modules.to(memory_format=torch.channels_last)
    training = Training(run, modules)
    scenes, means, deviations = encode_pool(vae, run)
    scheduler = make_scheduler()
    for rng in training.batches():
        items = rng.integers(len(scenes), size=run.batch)
        latents = means[items] + deviations[items] * torch.randn_like(means[items])
        texts = training_captions(rng, [scenes[i] for i in items], training.step)
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (run.batch,))
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        words = modules["text_encoder"](tokens).last_hidden_state
        training.update(mse_loss(modules["unet"](noisy, timesteps, words).sample, noise))
    return make_pipeline(vae, tokenizer, training.finished())


def followed(guidance: float, seeds: int = 2) -> dict[str, float]:
    """The saved pipeline's share of right pictures by attribute, over all held-out scenes, by the oracle."""
    prompts = [caption(scene, i) for i, scene in enumerate(held_out_scenes())] * seeds
    sampler = replace(Sampler(**SAMPLING), guidance_scale=guidance)
    images = list(sample(load_pipeline("pocket"), prompts, range(len(prompts)), sampler, batch_size=60))
    return {name: float(right.mean()) for name, right in Oracle.load().correct(images, prompts).items()}
