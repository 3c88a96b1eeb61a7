"""The score of a completion under a vision-language model: the sum of log p over its tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prefopt.objectives import Scored

# What a batch holds for us and not for the model.
OURS = (
    "completion_mask",
    "item",
    "mask",
    "p_chosen",
    "ranks",
    "reference",
    "tokens",
    "tokens_per_example",
)


class CompletionScore:
    """Sum of log p over each completion's tokens, in nats, (batch, 2), chosen then rejected, float32.

    The batch holds 2 * batch rows, all chosen, then all rejected; `completion_mask` marks the scored tokens.
    The language head runs only on the columns in front of them, and only the scored logits become float32.
    """

    extras = frozenset({"nll"})

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Scored:
        """The scores of a batch through the model that the trainer hands over; `nll` is the same negated."""
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
        zeros = torch.zeros(len(targets), dtype=torch.float32, device=log_p.device)
        scores = sides(zeros.index_add(0, rows, log_p))
        return Scored(scores, nll=-scores)


def sides(rows: Tensor) -> Tensor:
    """A value of each row, (2 * batch,), as (batch, 2)."""
    return rows.unflatten(0, (2, -1)).T
