"""The function that scores a batch, as the trainer takes it, and what is checked of what it returns."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.objectives import Batch, Objective, Scored
from prefopt.visits import where


@runtime_checkable
class Score(Protocol):
    """Scores a batch through the model it is handed; `extras` names those of its `Scored`."""

    extras: frozenset[str]

    def __call__(self, model: nn.Module, batch: Batch) -> Scored: ...


# A function without `extras` gives scores alone.
AnyScore = Score | Callable[[nn.Module, Batch], Scored]


def check_extras(objective: Objective, score: AnyScore, model: nn.Module) -> None:
    """InputError if the objective needs an extra of `Scored` that the score does not declare."""
    declared = score.extras if isinstance(score, Score) else frozenset()
    if missing := sorted(objective.needs - declared):
        raise InputError(
            f"this objective needs {' and '.join(missing)}, which {type(model).__name__} cannot give; "
            "choose another --loss_type, or leave out the option that needs it. (A score that returns more "
            f"than scores declares it, as `extras = frozenset({set(missing)})`.)"
        )


def check_scored(scored: Any, batch: Batch, objective: Objective) -> None:
    """InputError unless the score is a `Scored` with a number per candidate and what else is needed."""
    if not isinstance(batch.get("ranks"), Tensor) or batch["ranks"].ndim != 2:
        raise InputError(
            f"the batch has no `ranks` (batch, k), only {', '.join(map(str, batch))}: give every example "
            "`ranks` (k,), 1 for its best candidate, equal for a tie, 0 for an empty place"
        )
    if not isinstance(scored, Scored):
        raise InputError(
            f"score returned a {type(scored).__name__}; return a prefopt.Scored, whose scores are (batch, k)"
        )
    if scored.scores.shape != batch["ranks"].shape:
        raise InputError(
            f"score returned scores of shape {tuple(scored.scores.shape)}, and the batch's ranks have "
            f"{tuple(batch['ranks'].shape)}: return one score for each candidate, (batch, k)"
        )
    if missing := [name for name in sorted(objective.needs) if getattr(scored, name) is None]:
        raise InputError(
            f"score declares {' and '.join(missing)} in its `extras` and returned none: "
            f"return Scored(scores, {', '.join(f'{name}=...' for name in missing)})"
        )


def not_finite(losses: Tensor, batch: Batch, step: int, examples: object) -> InputError:
    """The error for losses (batch,) that are not all finite; names the examples, or else the batch's rows."""
    rows = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    bad = f"row {', '.join(map(str, rows))} of a batch of {len(losses)} (counted from 0; if the batch had "
    bad += "`item`, the index of each example, they would be named)"
    if "item" in batch:
        items = batch["item"].tolist() if isinstance(batch["item"], Tensor) else list(batch["item"])
        bad = f"{', '.join(where(examples, items[row]) for row in rows)} (the batch's items are {items})"
    return InputError(
        f"the loss is not finite at step {step}, for {bad}. The last checkpoint is untouched; look at these "
        "rows, or lower --learning_rate, or use bf16 in place of fp16"
    )
