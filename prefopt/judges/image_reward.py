"""ImageReward (arXiv 2304.05977): a BLIP that reads the prompt beside the image, and a head on what it read.

The text encoder attends to the image's patches in every layer; the head, linear layers with nothing between
them, turns the first token into one number, which is standardised by the published mean and deviation. (It
was trained on the number itself: a difference of 1 here was one of 1.03 there.) A model is a folder with
config.json, model.safetensors, preprocessor_config.json and the tokenizer's files, or such a repository on
the hub; scripts/convert_image_reward.py makes one of the published tensors.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPImageProcessorPil,
    PreTrainedModel,
)

from prefopt.judges.clip import warn_of_cut_prompts
from prefopt.loading import load_complete, load_part

MODEL_TYPE = "image_reward"
CONVERTER = "scripts/convert_image_reward.py"


class ImageRewardConfig(BlipConfig):
    """BLIP's two configs, the head's widths, and what standardises its output."""

    model_type = MODEL_TYPE

    head_sizes: list[int] | tuple[int, ...] = (768, 1024, 128, 64, 16, 1)
    mean: float = 0.16717362830052426
    std: float = 1.0333394966054072
    prompt_tokens: int = 35  # what of a prompt is read


class ImageRewardModel(PreTrainedModel):
    """Pixels (n, 3, side, side) and tokens (n, prompt_tokens) to rewards (n,)."""

    config_class = ImageRewardConfig
    config: ImageRewardConfig

    def __init__(self, config: ImageRewardConfig):
        super().__init__(config)
        # transformers builds cross attention for decoders alone. Its forward pass stays an encoder's.
        text: Any = config.text_config
        text.is_decoder = True
        vision: Any = config.vision_config
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise(config.head_sizes)))
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (n,)."""
        image = self.visual_encoder(pixel_values).last_hidden_state
        read = self.text_encoder(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - self.config.mean) / self.config.std


class ImageRewardScorer:
    """Rewards of images for their prompts by an ImageReward of a folder or a hub id; safetensors only.

    A prompt longer than the model reads is cut at its end, and the log says how many were.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ):
        name, what = str(model_name_or_path), f"ImageReward as {CONVERTER} writes it"
        self.model: Any = load_complete(ImageRewardModel, name, what, revision).float().eval().to(device)
        self.images: Any = load_part(CLIPImageProcessorPil, name, what, revision)
        self.tokenizer: Any = load_part(BertTokenizer, name, what, revision)
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def rewards(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Rewards (n,) in logits of n images, each for the prompt at its place."""
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} images but {len(prompts)} prompts: each image is scored for its own"
            )
        window = self.model.config.prompt_tokens
        warn_of_cut_prompts(self.tokenizer, list(dict.fromkeys(prompts)), window, "ImageReward")
        rewards = np.empty(len(images))
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            pixels = self.images([image.convert("RGB") for image in images[batch]], return_tensors="pt")
            # All to one length, so that a reward does not depend on the batch's other prompts.
            form: Any = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            tokens = self.tokenizer(list(prompts[batch]), max_length=window, **form)
            inputs = (pixels["pixel_values"], tokens["input_ids"], tokens["attention_mask"])
            rewards[batch] = self.model(*(each.to(self.device) for each in inputs)).cpu().numpy()
        return rewards
