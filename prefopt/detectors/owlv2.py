"""OWLv2 (arXiv 2306.09683) through transformers: open vocabulary, Apache-2.0, nothing more to install."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from transformers import Owlv2ForObjectDetection, Owlv2Processor

from prefopt.detectors import Box
from prefopt.detectors.selecting import MAX_OVERLAP, MIN_CONFIDENCE, distinct, in_batches, select
from prefopt.files import content_key
from prefopt.loading import files_identity, load_complete, load_part

MODEL_TYPE = "owlv2"
TEMPLATE = "a photo of a {}"


def identity(
    model_name_or_path: str,
    revision: str | None = None,
    *,
    template: str = TEMPLATE,
    min_confidence: float = MIN_CONFIDENCE,
    max_overlap: float = MAX_OVERLAP,
) -> str:
    """All that the boxes depend on, from the model's files: nothing is loaded."""
    files = files_identity(model_name_or_path, revision)
    return content_key(json.dumps([MODEL_TYPE, files, template, min_confidence, max_overlap]))


class Owlv2:
    """A detector by a hub id or a folder; safetensors only. Each class is embedded once.

    `template` words a class for the text encoder. Boxes under `min_confidence` are left out; of two of one
    class that overlap by more than `max_overlap` the more confident one is kept.
    """

    def __init__(
        self,
        model_name_or_path: str = "google/owlv2-base-patch16-ensemble",
        revision: str | None = None,
        *,
        template: str = TEMPLATE,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        min_confidence: float = MIN_CONFIDENCE,
        max_overlap: float = MAX_OVERLAP,
    ):
        name, what = str(model_name_or_path), "OWLv2 with its processor"
        self.model: Any = load_complete(Owlv2ForObjectDetection, name, what, revision, dtype=torch.float32)
        self.model.eval().to(device)
        self.processor: Any = load_part(Owlv2Processor, name, what, revision)
        self.template, self.device, self.batch_size = template, device, batch_size
        self.min_confidence, self.max_overlap = min_confidence, max_overlap
        self.identity = identity(
            name, revision, template=template, min_confidence=min_confidence, max_overlap=max_overlap
        )
        self._text: dict[str, Tensor] = {}  # class -> (d,)

    def detect(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[list[Box]]:
        """The boxes of each image, the most confident first, asked for its own classes."""
        asked = distinct(images, classes)
        self._embed(list(dict.fromkeys(name for names in asked for name in names if name not in self._text)))
        return in_batches(images, asked, self.batch_size, self._detect)

    @torch.no_grad()
    def _detect(self, images: list[Image.Image], classes: list[list[str]]) -> list[list[Box]]:
        pixels = self.processor.image_processor(
            [image.convert("RGB") for image in images], return_tensors="pt"
        )["pixel_values"].to(self.device)
        features, _ = self.model.image_embedder(pixels)  # (n, height, width, d)
        places = features.flatten(1, 2)
        text = torch.stack([torch.stack([self._text[name] for name in names]) for names in classes])
        logits, _ = self.model.class_predictor(places, text)  # (n, places, classes)
        corners = box_convert(self.model.box_predictor(places, features), "cxcywh", "xyxy")
        return [
            select(
                # The image is padded to a square at its right or bottom.
                corners[i] * max(image.size),
                logits[i].sigmoid(),
                classes[i],
                image.size,
                min_confidence=self.min_confidence,
                max_overlap=self.max_overlap,
            )
            for i, image in enumerate(images)
        ]

    @torch.no_grad()
    def _embed(self, classes: list[str]) -> None:
        if not classes:
            return
        tokens = self.processor.tokenizer(
            [self.template.format(name) for name in classes],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features = self.model.owlv2.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        self._text.update(zip(classes, features, strict=True))
