"""The score of a completion under a vision-language model: the sum of log p over its answers' tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from prefopt.errors import InputError
from prefopt.objectives import Batch, Scored
from prefopt.vlm.trees import attention_mask
from prefopt.vlm.vision import collate, encode_images, image_outputs

LOGITS = 2**26  # at once: 256 MiB in float32
# What a configuration calls a function of the logits that the head gives.
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class CompletionScore:
    """Sum of log p over each completion's scored tokens, in nats, (batch, k), float32; of Collator's batches.

    The language head runs on the places in front of scored tokens alone, in chunks that the backward pass
    computes again: the logits of a whole batch never exist. With a `frozen_vision` tower and projector,
    images are encoded once for policy and reference.
    """

    extras = frozenset({"nll"})

    def __init__(self, *, frozen_vision: bool = False):
        self.frozen_vision = frozen_vision

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with its images encoded, if no training changes what they are encoded to.

        In the plain batch the model encodes them itself, for each completion, as in other trainers.
        """
        if not self.frozen_vision or "sees" not in batch or not batch.get("images"):
            return batch
        features = encode_images(model, batch["images"], batch["counts"])
        return {name: value for name, value in batch.items() if name != "images"} | {"features": features}

    def __call__(self, model: nn.Module, batch: Batch) -> Scored:
        """The scores of a batch through the model that the trainer hands over; `nll` is the same negated."""
        unwrapped: Any = extract_model_from_parallel(model)
        inputs = _inputs(unwrapped.config, batch)
        with _scoring_head(unwrapped.get_output_embeddings(), batch["places"], batch["targets"]):
            log_p = model(**inputs, use_cache=False).logits
        zeros = torch.zeros(batch["tokens"].numel(), dtype=torch.float32, device=log_p.device)
        scores = zeros.index_add(0, batch["owner"], log_p).view_as(batch["tokens"])
        return Scored(scores, nll=-scores)


def completion_metrics(batch: Batch, scores: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of pairs, the scores of both sides under trl's names: log p of a whole completion, in nats."""
    if scores.shape[1] != 2:
        return {}
    ones = torch.ones_like(scores[:, 0])
    return {"logps/chosen": (scores[:, 0], ones), "logps/rejected": (scores[:, 1], ones)}


def check_head(config: PretrainedConfig) -> None:
    """InputError for a model whose language head does not have the last word about its logits."""
    text: Any = config.get_text_config(decoder=True)
    for name in CHANGES_LOGITS:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"{config.model_type} changes its logits after the language head ({name} is "
                f"{getattr(text, name)}), and its completions cannot be scored; train another model"
            )


def _inputs(config: PretrainedConfig, batch: Batch) -> dict[str, Any]:
    """What the model's forward takes of a batch."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "features" in batch:
        inputs["mm_encoder_outputs"] = {
            "image": image_outputs([batch["features"][n] for n in batch["shown"]])
        }
    else:
        inputs |= collate([batch["images"][n] for n in batch["shown"]])
    if "sees" not in batch:
        return inputs | {"attention_mask": batch["attention_mask"], **batch["kinds"]}
    mask = attention_mask(batch["segment"], batch["sees"])
    text: Any = config.get_text_config(decoder=True)
    if text._attn_implementation == "eager":  # which adds it to the logits
        low = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, low)
    return inputs | {"position_ids": batch["position_ids"], "attention_mask": mask}


@contextmanager
def _scoring_head(head: Any, places: Tensor, targets: Tensor) -> Iterator[None]:
    """Within, the language head gives log p of `targets` (tokens,) at `places` (tokens,) of its input.

    It has to run inside of the model's forward, where distributed training has its weights at hand.
    """
    ordinary, own = head.forward, "forward" in vars(head)

    def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
        return -cross_entropy(ordinary(hidden).float(), tokens, reduction="none")

    def log_p(hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1).index_select(0, places)
        size = max(1, LOGITS // head.weight.shape[0])
        chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(chunks) == 1:
            return chunk(*chunks[0])
        return torch.cat([checkpoint(chunk, *one, use_reentrant=False) for one in chunks])

    head.forward = log_p
    try:
        yield
    finally:
        if own:
            head.forward = ordinary
        else:
            del head.forward
