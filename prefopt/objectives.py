"""The menu of objectives: `--loss_type` and its options, once for every recipe.

An objective is a function of (scored, reference scores, batch). It finds in a batch, whatever the model is:
`ranks` (batch, k), 1 is the best; `mask` (batch, k), False where a list was padded; and where they apply
`p_chosen` (batch,), how likely the chosen is the better one; `tokens` (batch, k), the completions' lengths;
`tokens_per_example`, the mean length of the chosen completions of the whole optimizer step.

Every loss is averaged over the examples of the optimizer step. Its mean over the step's *tokens* is the same
average of each example's sum divided by `tokens_per_example`, so no loss depends on how a step is split into
batches or over processes.

A new objective is a function and an entry of `OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from prefopt.errors import InputError
from prefopt.losses import (
    Pair,
    PreferenceLoss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
)
from prefopt.options import check_interval, option

Batch = Mapping[str, Any]


class Scored(NamedTuple):
    """What a model says of a batch's candidates; a model that cannot give an extra leaves it out."""

    scores: Tensor  # (batch, k), higher where the model likes a candidate more
    nll: Tensor | None = None  # (batch, k), negative log-likelihood in nats, or the denoising error
    clean: Tensor | None = None  # (batch, k, C, H, W), the predicted clean latents


class Loss(NamedTuple):
    """What an objective returns."""

    losses: Tensor  # (batch,)
    rewards: Tensor | None = None  # (batch, k), beta * (score - reference score), detached
    terms: Mapping[str, Tensor] = {}  # parts of the losses for the log, (batch,) each, detached


@dataclass(frozen=True)
class Objective:
    """A function of (scored, reference scores, batch), and what it needs."""

    compute: Callable[[Scored, Tensor | None, Batch], Loss]
    needs_reference: bool = True
    needs: frozenset[str] = frozenset()  # extras of `Scored`
    soft_labels: bool = False  # whether it uses `p_chosen`
    label_smoothing: float = 0.0  # of labels that are not soft

    def __call__(self, scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        """The losses of a batch; `reference` (batch, k) if the objective needs one."""
        return self.compute(scored, reference, batch)

    def check_labels(self, soft: bool) -> None:
        """InputError for soft labels that this objective cannot use, or would smooth once more."""
        if soft and not self.soft_labels:
            raise InputError(
                "the pairs have the column p_chosen, which this --loss_type cannot use: take dpo or cpo, or "
                "remove the column"
            )
        if soft and self.label_smoothing:
            raise InputError("the pairs have the column p_chosen: leave out --label_smoothing, or the column")


def pairwise(
    loss: Callable[..., PreferenceLoss],
    *,
    with_reference: bool = True,
    per_token: bool = False,
    soft_labels: bool = False,
    **options: Any,
) -> Objective:
    """The objective of a loss on pairs of scores: the policy's and, `with_reference`, the reference's.

    `per_token` averages scores over a completion's tokens. With `soft_labels` a batch's p_chosen takes the
    place of the loss's `label_smoothing`, which is then 1 - p_chosen.
    """

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        sides = [scored.scores] + ([_given(reference)] if with_reference else [])
        pairs = [_pair(_per_token(scores, batch) if per_token else scores) for scores in sides]
        outcome = loss(*pairs, **options | (_soft_labels(batch) if soft_labels else {}))
        return Loss(outcome.losses, outcome.rewards.stacked)

    smoothing = options.get("label_smoothing", 0.0)
    return Objective(compute, with_reference, soft_labels=soft_labels, label_smoothing=smoothing)


def supervised() -> Objective:
    """Supervised fine-tuning on the best candidate: its denoising error, or a mean over the step's tokens."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        return Loss(sft_loss(_chosen_nll(scored, batch)))

    return Objective(compute, needs_reference=False, needs=frozenset({"nll"}))


def contrastive(beta: float, likelihood_weight: float, label_smoothing: float) -> Objective:
    """CPO: pairs without a reference, and the likelihood of the chosen as in supervised fine-tuning."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        options = {"beta": beta, "likelihood_weight": likelihood_weight, "label_smoothing": label_smoothing}
        nll = _chosen_nll(scored, batch)
        outcome = cpo_loss(_pair(scored.scores), chosen_nll=nll, **options | _soft_labels(batch))
        return Loss(outcome.losses, outcome.rewards.stacked, {"nll/chosen": nll.detach()})

    return Objective(compute, False, frozenset({"nll"}), soft_labels=True, label_smoothing=label_smoothing)


# The menu, by --loss_type: from the options and a plain beta. (A p_chosen of 0.5 would divide robust by 0.)
OBJECTIVES: dict[str, Callable[["ObjectiveOptions", float], Objective]] = {
    "dpo": lambda o, beta: pairwise(dpo_loss, beta=beta, label_smoothing=o.label_smoothing, soft_labels=True),
    "ipo": lambda o, beta: pairwise(ipo_loss, beta=beta, per_token=True),
    "hinge": lambda o, beta: pairwise(hinge_loss, beta=beta),
    "robust": lambda o, beta: pairwise(robust_dpo_loss, beta=beta, label_smoothing=o.label_smoothing),
    "cpo": lambda o, beta: contrastive(beta, o.likelihood_weight, o.label_smoothing),
    "simpo": lambda o, beta: pairwise(
        simpo_loss, beta=beta, gamma=o.simpo_gamma, per_token=True, with_reference=False
    ),
}
SMOOTHED = ("dpo", "robust", "cpo")
# The options that not every loss has, with those that have them.
_OPTIONS_OF = {"label_smoothing": SMOOTHED, "likelihood_weight": ("cpo",), "simpo_gamma": ("simpo",)}


@dataclass
class ObjectiveOptions:
    """The options that choose an objective on pairs."""

    BETA: ClassVar[str] = "beta"  # the option that holds beta

    loss_type: str = option("dpo", "The objective on pairs of candidates.", choices=OBJECTIVES)
    label_smoothing: float = option(
        0.0, f"Share of labels taken to be wrong, in [0, 0.5); for {', '.join(SMOOTHED)}."
    )
    likelihood_weight: float = option(1.0, "For cpo: weight of the chosen side's negative log-likelihood.")
    simpo_gamma: float = option(0.5, "For simpo: the reward margin that is aimed at.")

    def __post_init__(self) -> None:
        check_interval(self, "(0, inf)", self.BETA)
        check_interval(self, "[0, 0.5)", "label_smoothing")
        check_interval(self, "[0, inf)", "likelihood_weight")
        if self.loss_type not in OBJECTIVES:
            raise InputError(f"--loss_type is {self.loss_type!r}; choose from {', '.join(OBJECTIVES)}")
        for name, losses in _OPTIONS_OF.items():
            if self.loss_type not in losses and getattr(self, name) != getattr(type(self), name):
                raise InputError(f"--{name} is for {', '.join(losses)}, not for {self.loss_type}")


def objective_of(options: ObjectiveOptions, beta: float) -> Objective:
    """The objective that the options choose; `beta` is plain: it multiplies margins and nothing else."""
    return OBJECTIVES[options.loss_type](options, beta)


def _given(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("this objective compares with a reference, and got no reference scores")
    return reference


def _pair(scores: Tensor) -> Pair:
    if scores.shape[1] != 2:
        raise InputError(f"this --loss_type is for pairs; an example here has {scores.shape[1]} candidates")
    return Pair(*scores.unbind(1))


def _soft_labels(batch: Batch) -> dict[str, Any]:
    return {"label_smoothing": 1 - batch["p_chosen"]} if "p_chosen" in batch else {}


def _per_token(scores: Tensor, batch: Batch) -> Tensor:
    """Scores averaged over the completions' tokens; where there are none, the scores are means already."""
    return scores / batch["tokens"] if "tokens" in batch else scores


def _chosen_nll(scored: Scored, batch: Batch) -> Tensor:
    """(batch,) whose mean over the step's examples is the mean over its tokens, or over its images."""
    if scored.nll is None:
        raise ValueError("this objective needs the candidates' nll, and the model gives none")
    chosen = scored.nll[:, 0]
    if "tokens" not in batch:
        return chosen
    return chosen / batch.get("tokens_per_example", batch["tokens"][:, 0].float().mean())
