"""The classes' embeddings for a detector: CLIP's, computed once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers import AutoTokenizer, CLIPModel

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.loading import load_complete, load_part


class ClassEmbeddings:
    """Unit embeddings of `template` filled with a class, padded with zeros to `size`; each computed once.

    CLIP is loaded from a folder, a hub id or `pocket`, safetensors only.
    """

    def __init__(
        self,
        clip: str,
        revision: str | None = None,
        *,
        template: str = "{}",
        size: int = 512,
        device: str | torch.device = "cpu",
    ):
        name, what = pocket.resolve(clip, "clip"), "CLIP with its tokenizer, which embeds the classes,"
        model: Any = load_complete(CLIPModel, name, what, revision)
        self.tokenizer: Any = load_part(AutoTokenizer, name, what, revision, trust_remote_code=False)
        if model.config.projection_dim > size:
            raise InputError(
                f"{name} embeds texts in {model.config.projection_dim} numbers, the detector takes {size} at "
                "most: name the CLIP that it was trained with"
            )
        del model.vision_model, model.visual_projection
        self.model = model.float().eval().to(device)
        self.template, self.size, self.device = template, size, device
        self.window = model.config.text_config.max_position_embeddings
        self._kept: dict[str, Tensor] = {}

    def __call__(self, classes: Sequence[str]) -> Tensor:
        """(len(classes), size), each a unit vector."""
        missing = [name for name in dict.fromkeys(classes) if name not in self._kept]
        if missing:
            self._kept.update(zip(missing, self._embed(missing), strict=True))
        return torch.stack([self._kept[name] for name in classes])

    @torch.no_grad()
    def _embed(self, classes: list[str]) -> Tensor:
        tokens = self.tokenizer(
            [self.template.format(name) for name in classes],
            padding="max_length",
            truncation=True,
            max_length=self.window,
            return_tensors="pt",
        ).to(self.device)
        output = self.model.get_text_features(**tokens)
        features = normalize(output.pooler_output, dim=-1)
        return pad(features, (0, self.size - features.shape[-1]))
