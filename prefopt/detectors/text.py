"""What a class is called in a detector's feature space: CLIP's embedding of its name, computed once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers import AutoTokenizer, CLIPModel

from prefopt import pocket
from prefopt.records import InputError
from prefopt.store import content_key, tensors_key


class ClassEmbeddings:
    """Unit embeddings of `template` filled with a class, filled up with zeros to `size`; kept once computed.

    CLIP is read from a folder, a hub id or `pocket`, safetensors only; `identity` names its weights.
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
        name = pocket.resolve(clip, "clip")
        revision = revision or "main"
        try:
            # Any: transformers' annotations of what these hold are wider than what CLIP returns.
            model: Any = CLIPModel.from_pretrained(name, revision=revision, use_safetensors=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{name} cannot be read as a CLIP of safetensors with its tokenizer, by which the detector "
                f"understands classes: {error}"
            ) from error
        if model.config.projection_dim > size:
            raise InputError(
                f"{name} embeds texts in {model.config.projection_dim} numbers, the detector takes {size} at "
                "most: name the CLIP that it was trained with"
            )
        del model.vision_model, model.visual_projection
        self.model = model.float().eval().to(device)
        self.template, self.size, self.device = template, size, device
        self.window = model.config.text_config.max_position_embeddings
        self.identity = content_key(
            json.dumps([tensors_key(model.state_dict()), self.tokenizer.backend_tokenizer.to_str(), template])
        )
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
