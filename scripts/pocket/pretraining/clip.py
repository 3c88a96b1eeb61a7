"""Trains the pocket's CLIPModel: the judge that scores how well a picture follows its prompt.

Beside the other captions of the batch, each picture is held against captions that are wrong in one attribute:
these are the mistakes that the pocket's text-to-image model makes.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessor

from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, Scene, caption, train_scenes
from pretraining.common import Run, Training, captions
from pretraining.pictures import Pool
from pretraining.text_to_image import one_attribute_off
from pretraining.tokenizer import make_tokenizer

_WRONG_PER_PICTURE = 6
_HIGHEST_SCALE = 4.6052  # ln 100, as in CLIP


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A vision transformer of 4 layers over 8 x 8 patches and a text transformer of 2, both of width 128."""
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = tower | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Pictures to 64 x 64, values to -1..1."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(n, 128) unit vectors."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(input_ids=tokens.input_ids).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


def embed_pictures(model: CLIPModel, pixels: Tensor) -> Tensor:
    """(n, 128) unit vectors of pictures (n, 3, 64, 64) in -1..1."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def contrastive_loss(pictures: Tensor, texts: Tensor, wrong: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; each picture (n, d) also meets its own wrong captions (n, k, d)."""
    target = torch.arange(len(pictures))
    every = scale * pictures @ texts.T
    own_wrong = scale * torch.einsum("nd,nkd->nk", pictures, wrong)
    return (cross_entropy(torch.cat([every, own_wrong], 1), target) + cross_entropy(every.T, target)) / 2


def train(run: Run, pool: Pool) -> tuple[CLIPModel, CLIPProcessor]:
    """The model with averaged weights, in float32, and its processor."""
    torch.manual_seed(run.seed)
    tokenizer = make_tokenizer()
    model = make_clip(tokenizer)
    training = Training(run, torch.nn.ModuleDict({"clip": model}))
    of_scene: dict[Scene, list[int]] = {scene: [] for scene in train_scenes()}
    for i, scene in enumerate(pool.scenes):
        of_scene[scene].append(i)
    names = train_scenes()
    for rng in training.batches():
        # No scene twice in a batch: a second picture of a scene would make its caption right for both.
        scenes = [names[i] for i in rng.choice(len(names), size=run.batch, replace=False)]
        pictures = embed_pictures(model, pool.draw(rng, np.array([rng.choice(of_scene[s]) for s in scenes])))
        wrong = [one_attribute_off(rng, s) for s in scenes for _ in range(_WRONG_PER_PICTURE)]
        texts = embed_texts(model, tokenizer, captions(rng, scenes + wrong))
        right, wrong_texts = texts[: run.batch], texts[run.batch :].view(run.batch, _WRONG_PER_PICTURE, -1)
        training.update(contrastive_loss(pictures, right, wrong_texts, model.logit_scale.exp()))
        with torch.no_grad():
            model.logit_scale.clamp_(max=_HIGHEST_SCALE)
    training.finished()
    return model, make_processor(tokenizer)


@torch.no_grad()
def one_change_accuracy(
    model: CLIPModel, processor: Any, scenes: list[Scene], images: list[Image.Image]
) -> dict[str, float]:
    """For each attribute: how often the true caption beats *every* caption that is wrong in it alone."""
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    pictures = embed_pictures(model, pixels)
    shares: dict[str, float] = {}
    for name, values in ATTRIBUTES.items():
        texts = [
            caption(replace(scene, **{name: value}), i % PHRASINGS)
            for i, scene in enumerate(scenes)
            for value in values
        ]
        scores = torch.einsum(
            "nd,nkd->nk",
            pictures,
            embed_texts(model, processor.tokenizer, texts).view(len(scenes), len(values), -1),
        )
        best = scores.argmax(-1).tolist()
        shares[name] = float(
            np.mean([values[b] == getattr(scene, name) for b, scene in zip(best, scenes, strict=True)])
        )
    return shares
