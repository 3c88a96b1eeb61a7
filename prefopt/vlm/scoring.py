"""The score of a completion under a vision-language model: the sum of log p over its tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# What a batch carries for us and not for the model.
OURS = ("completion_mask", "item", "reference")


def completion_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of log p over each completion's tokens, in nats: (batch, 2), chosen then rejected, float32.

    The batch holds 2 * batch rows, all chosen, then all rejected; `completion_mask` marks the scored tokens.
    The language head runs only on the columns in front of them, and only the scored logits become float32.
    """
    targets = batch["completion_mask"][:, 1:].bool()  # the token at t + 1 is predicted at t
    columns = targets.any(dim=0).nonzero().squeeze(1)
    targets = targets[:, columns]
    inputs = {name: value for name, value in batch.items() if name not in OURS}
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    if logits.shape[1] != len(columns):  # a model that knows no logits_to_keep gives every position
        logits = logits[:, columns]
    tokens = batch["input_ids"][:, 1:][:, columns]
    log_p = -cross_entropy(logits[targets].float(), tokens[targets], reduction="none")
    rows = targets.nonzero()[:, 0]
    sums = torch.zeros(len(targets), dtype=torch.float32, device=log_p.device).index_add(0, rows, log_p)
    return sums.unflatten(0, (2, -1)).T


def average_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`completion_scores` over the number of a completion's tokens, in nats a token: (batch, 2), float32."""
    lengths = batch["completion_mask"].sum(dim=1)
    return completion_scores(model, batch) / lengths.unflatten(0, (2, -1)).T
