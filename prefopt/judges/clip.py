"""CLIP and what is shaped like it: the CLIP score, and rewards in logits such as PickScore's.

The CLIP score is 100 times the cosine of image and prompt embedding (arXiv 2104.08718, not clamped).
PickScore (arXiv 2305.01569) is a CLIP trained on people's choices, its scale included.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from prefopt import pocket
from prefopt.files import content_key
from prefopt.loading import files_identity, load_complete, load_part

logger = logging.getLogger(__name__)


class ClipScorer:
    """Scores images against their prompts with a CLIP of a folder, a hub id or `pocket`; safetensors only.

    A prompt longer than the text encoder's window is cut at its end, and the log says how many were. Each
    unique prompt is embedded once.
    """

    def __init__(
        self,
        model_name_or_path: str = "pocket",
        revision: str | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ):
        name, what = pocket.resolve(str(model_name_or_path), "clip"), "CLIP with its processor"
        # Any: transformers' annotations of what these hold are wider than what CLIP returns.
        self.model: Any = load_complete(CLIPModel, name, what, revision).float().eval().to(device)
        self.processor: Any = load_part(CLIPProcessor, name, what, revision)
        self.device = device
        self.batch_size = batch_size
        self.identity = clip_identity(model_name_or_path, revision)
        self._text: dict[str, Tensor] = {}  # prompt -> unit embedding (d,)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Scores (n,) float32, in -100..100, of n images, each against the prompt at its place."""
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} images but {len(prompts)} prompts: each image is scored against its own"
            )
        self._embed([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text])
        scores = np.empty(len(images), dtype=np.float32)
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            text = torch.stack([self._text[prompt] for prompt in prompts[batch]])
            scores[batch] = (100 * (self._image_features(images[batch]) * text).sum(-1)).cpu().numpy()
        return scores

    def rewards(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Rewards (n,) in logits: exp(logit_scale) times the cosine, as arXiv 2305.01569 has it."""
        scale = self.model.logit_scale.detach().exp().item()
        return self(images, prompts).astype(np.float64) / 100 * scale

    @torch.no_grad()
    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor.image_processor(
            [image.convert("RGB") for image in images], return_tensors="pt"
        )
        output = self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device))
        return torch.nn.functional.normalize(output.pooler_output, dim=-1)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> None:
        """Compute and keep the unit embedding of each prompt."""
        tokenizer, window = self.processor.tokenizer, self.model.config.text_config.max_position_embeddings
        warn_of_cut_prompts(tokenizer, prompts, window, "CLIP")
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            tokens = tokenizer(
                batch, padding="max_length", truncation=True, max_length=window, return_tensors="pt"
            )
            output = self.model.get_text_features(**tokens.to(self.device))
            features = torch.nn.functional.normalize(output.pooler_output, dim=-1)
            self._text.update(zip(batch, features, strict=True))


def warn_of_cut_prompts(tokenizer: Any, prompts: list[str], window: int, reader: str) -> None:
    """Log how many prompts are longer than the tokens that a model reads."""
    whole = tokenizer(prompts, truncation=False, verbose=False)["input_ids"] if prompts else []
    if cut := sum(len(tokens) > window for tokens in whole):
        logger.warning(
            "%d of %d prompts are longer than %s's %d tokens: cut", cut, len(prompts), reader, window
        )


def clip_identity(model_name_or_path: str, revision: str | None = None) -> str:
    """What the scores depend on, from the model's files: nothing is loaded."""
    return content_key(f"clip {files_identity(pocket.resolve(str(model_name_or_path), 'clip'), revision)}")
