"""The menu of objectives: `--loss_type` and its options, once for every recipe.

An objective is a function of (scored, reference scores, batch). It finds in a batch, whatever the model is:
`ranks` (batch, k), 1 is the best, equal is a tie and 0 an empty place; and where they apply `p_chosen`
(batch,), how likely the chosen of a pair is the better one; `tokens` (batch, k), the completions' lengths;
`tokens_per_example`, the mean length of the chosen completions of the whole optimizer step.

A loss on pairs serves lists, too: as a weighted mean over every two candidates of which one is ranked higher.
Every loss is averaged over the examples of the optimizer step. Its mean over the step's *tokens* is the same
average of each example's sum divided by `tokens_per_example`, so no loss depends on how a step is split into
batches or over processes.

A new objective is a function and an entry of `OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from prefopt.errors import InputError
from prefopt.losses import (
    PairWeights,
    PreferenceLoss,
    best_and_worst,
    cpo_loss,
    discriminator_loss,
    dpo_loss,
    every_pair,
    guard_winner,
    hinge_loss,
    ipo_loss,
    mapo_loss,
    over_pairs,
    plackett_luce_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
)
from prefopt.options import check_options, option

Batch = Mapping[str, Any]
PLACKETT_LUCE = "plackett_luce"


class Scored(NamedTuple):
    """What a model says of a batch's candidates; a model that cannot give an extra leaves it out."""

    scores: Tensor  # (batch, k), higher where the model likes a candidate more
    nll: Tensor | None = None  # (batch, k), negative log-likelihood in nats, or the denoising error
    residual: Tensor | None = None  # (batch, k, C, H, W), the network's prediction minus its target
    realism_loss: Tensor | None = None  # (batch, k), what a discriminator says of the predicted clean latents
    discriminator_loss: Tensor | None = None  # (batch,), its own loss, if it is trained as well
    penalty: Tensor | None = None  # (batch,), of a discriminator's gradient


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
    options: "ObjectiveOptions",
    *,
    with_reference: bool = True,
    per_token: bool = False,
    soft_labels: bool = False,
    likelihood: float | None = None,
    **settings: Any,
) -> Objective:
    """The objective of a loss on pairs of scores: the policy's and, `with_reference`, the reference's.

    `per_token` averages scores over a completion's tokens. With `soft_labels` a batch's p_chosen takes the
    place of the loss's `label_smoothing`, which is then 1 - p_chosen. `likelihood` is the weight that the
    loss gives the best candidate's negative log-likelihood, which is that of supervised fine-tuning.
    """
    mu = options.winner_guard

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        ranks, given, terms = batch["ranks"], dict(settings), {}
        scores = [scored.scores] + ([_given(reference, "reference scores")] if with_reference else [])
        pairs = [every_pair(_per_token(one, batch) if per_token else one, ranks) for one in scores]
        if mu is not None:
            pairs[0] = guard_winner(pairs[0], _given(scored.residual, "residual"), mu)
        if soft_labels and "p_chosen" in batch:
            given["label_smoothing"] = (1 - batch["p_chosen"])[:, None, None]
        if likelihood is not None:
            nll = _chosen_nll(scored, batch)
            given |= {"chosen_nll": nll[:, None, None], "likelihood_weight": likelihood}
            terms = {"nll/chosen": nll.detach()}
        outcome = over_pairs(loss(*pairs, **given), ranks, options.pair_weights)
        return Loss(outcome.losses, outcome.rewards, terms)

    needs = {"nll": likelihood is not None, "residual": mu is not None}
    smoothing = settings.get("label_smoothing", 0.0)
    return Objective(compute, with_reference, _names(needs), soft_labels, smoothing)


def listwise(beta: float, *, with_reference: bool, likelihood: float | None = None) -> Objective:
    """The likelihood of a whole ranking after Plackett and Luce, compared with a reference or, as CPO, alone.

    `likelihood` is the weight of the best candidate's negative log-likelihood, as in `pairwise`.
    """

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        compared = _given(reference, "reference scores") if with_reference else None
        outcome = plackett_luce_loss(scored.scores, batch["ranks"], beta=beta, reference=compared)
        if likelihood is None:
            return Loss(*outcome)
        nll = _chosen_nll(scored, batch)
        return Loss(
            outcome.losses + likelihood * sft_loss(nll), outcome.rewards, {"nll/chosen": nll.detach()}
        )

    return Objective(compute, with_reference, _names({"nll": likelihood is not None}))


def margin_aware(options: "ObjectiveOptions", beta: float) -> Objective:
    """MaPO, on the denoising errors of pairs or lists."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        errors = _given(scored.residual, "residual").square().mean((2, 3, 4))
        outcome = mapo_loss(every_pair(errors, batch["ranks"]), beta=beta)
        return Loss(*over_pairs(outcome, batch["ranks"], options.pair_weights))

    return Objective(compute, needs_reference=False, needs=frozenset({"residual"}))


def supervised() -> Objective:
    """Supervised fine-tuning on the best candidate: its denoising error, or a mean over the step's tokens."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        return Loss(sft_loss(_chosen_nll(scored, batch)))

    return Objective(compute, needs_reference=False, needs=frozenset({"nll"}))


def with_discriminator(objective: Objective, weight: float) -> Objective:
    """The objective with a discriminator's term, the mean over an example's candidates times `weight`, and
    the discriminator's own loss if it is trained as well."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        loss, there = objective.compute(scored, reference, batch), batch["mask"]
        term = (_given(scored.realism_loss, "realism_loss") * there).sum(1) / there.sum(1)
        losses, terms = loss.losses + weight * term, {**loss.terms, "discriminator/term": term.detach()}
        if scored.discriminator_loss is not None:
            losses = losses + scored.discriminator_loss
            terms["discriminator/loss"] = scored.discriminator_loss.detach()
        return loss._replace(losses=losses, terms=terms)

    return replace(objective, compute=compute, needs=objective.needs | {"realism_loss"})


def discriminating() -> Objective:
    """A discriminator's own: its candidates of rank 1 are real, all others generated."""

    def compute(scored: Scored, reference: Tensor | None, batch: Batch) -> Loss:
        ranks = batch["ranks"]
        loss = discriminator_loss(scored.scores, ranks == 1, ranks > 0)
        if scored.penalty is None:
            return Loss(loss, scored.scores.detach())
        return Loss(loss + scored.penalty, scored.scores.detach(), {"penalty": scored.penalty.detach()})

    return Objective(compute, needs_reference=False)


def _dpo(options: "ObjectiveOptions", beta: float) -> Objective:
    if options.list_loss == PLACKETT_LUCE:
        return listwise(beta, with_reference=True)
    return pairwise(dpo_loss, options, beta=beta, label_smoothing=options.label_smoothing, soft_labels=True)


def _cpo(options: "ObjectiveOptions", beta: float) -> Objective:
    likelihood, smoothing = options.likelihood_weight, options.label_smoothing
    if options.list_loss == PLACKETT_LUCE:
        return listwise(beta, with_reference=False, likelihood=likelihood)
    settings: Any = {"beta": beta, "label_smoothing": smoothing, "likelihood": likelihood}
    return pairwise(cpo_loss, options, with_reference=False, soft_labels=True, **settings)


# The menu, by --loss_type: from the options and a plain beta. (A p_chosen of 0.5 would divide robust by 0.)
OBJECTIVES: dict[str, Callable[["ObjectiveOptions", float], Objective]] = {
    "dpo": _dpo,
    "ipo": lambda o, beta: pairwise(ipo_loss, o, beta=beta, per_token=True),
    "hinge": lambda o, beta: pairwise(hinge_loss, o, beta=beta),
    "robust": lambda o, beta: pairwise(robust_dpo_loss, o, beta=beta, label_smoothing=o.label_smoothing),
    "cpo": _cpo,
    "simpo": lambda o, beta: pairwise(
        simpo_loss, o, beta=beta, gamma=o.simpo_gamma, per_token=True, with_reference=False
    ),
    "mapo": margin_aware,
}
SMOOTHED = ("dpo", "robust", "cpo")
# The options that not every loss has, with those that have them.
_OPTIONS_OF = {
    "label_smoothing": SMOOTHED,
    "likelihood_weight": ("cpo",),
    "simpo_gamma": ("simpo",),
    "list_loss": ("dpo", "cpo"),
    "winner_guard": ("dpo", "ipo", "hinge", "robust", "cpo", "simpo"),
}


@dataclass
class ObjectiveOptions:
    """The options that choose an objective on pairs or ranked lists."""

    BETA: ClassVar[str] = "beta"  # the option that holds beta

    loss_type: str = option("dpo", "The objective on pairs of candidates.", choices=OBJECTIVES)
    label_smoothing: float = option(
        0.0, f"Share of labels taken to be wrong, in [0, 0.5); for {', '.join(SMOOTHED)}.", within="[0, 0.5)"
    )
    likelihood_weight: float = option(
        1.0, "For cpo: weight of the chosen side's negative log-likelihood.", within="[0, 1e9]"
    )
    simpo_gamma: float = option(0.5, "For simpo: the reward margin that is aimed at.", within="[0, 1e6]")
    list_loss: Literal["pairs", "plackett_luce"] = option(
        "pairs",
        "On ranked lists: the loss on every two candidates (pairs), or for dpo and cpo the likelihood of the "
        "whole ranking (plackett_luce).",
    )
    pair_weights: PairWeights = option(
        "uniform",
        "Of a list's pairs: all alike (uniform), neighbours in rank only (adjacent), or by what a swap would "
        "cost the ranking (dcg).",
    )
    winner_guard: float | None = option(
        None,
        "Limit each rejected candidate's gradient so that the chosen's error does not rise (Diffusion-SDPO, "
        "arXiv 2511.03317): the share kept in reserve, in [0, 1), e.g. 0; off by default; for diffusion.",
        within="[0, 1)",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.loss_type not in OBJECTIVES:
            raise InputError(f"--loss_type is {self.loss_type!r}; choose from {', '.join(OBJECTIVES)}")
        for name, losses in _OPTIONS_OF.items():
            if self.loss_type not in losses and getattr(self, name) != getattr(type(self), name):
                raise InputError(f"--{name} is for {', '.join(losses)}, not for {self.loss_type}")
        if self.list_loss == PLACKETT_LUCE:
            for name in ("label_smoothing", "pair_weights", "winner_guard"):
                if getattr(self, name) != getattr(type(self), name):
                    raise InputError(f"--{name} is for --list_loss pairs, not for {PLACKETT_LUCE}")


def objective_of(options: ObjectiveOptions, beta: float) -> Objective:
    """The objective that the options choose; `beta` is plain: it multiplies margins and nothing else."""
    return OBJECTIVES[options.loss_type](options, beta)


@dataclass
class _WithBeta(ObjectiveOptions):
    beta: float = option(0.1, "Multiplies margins.", within="(0, 1e9]")


def make_objective(loss_type: str = "dpo", *, beta: float, **options: Any) -> Objective:
    """The objective of this name; `options` are those of `ObjectiveOptions`, such as `likelihood_weight`.

    `beta` is plain: it multiplies margins and nothing else.
    """
    return objective_of(_WithBeta(loss_type=loss_type, beta=beta, **options), beta)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this objective needs the candidates' {name}, and got none")
    return value


def _names(needed: Mapping[str, bool]) -> frozenset[str]:
    return frozenset(name for name, is_needed in needed.items() if is_needed)


def _per_token(scores: Tensor, batch: Batch) -> Tensor:
    """Scores averaged over the completions' tokens; where there are none, the scores are means already."""
    return scores / batch["tokens"] if "tokens" in batch else scores


def _chosen_nll(scored: Scored, batch: Batch) -> Tensor:
    """(batch,) whose mean over the step's examples is the mean over its tokens, or over its images."""
    chosen = best_and_worst(_given(scored.nll, "nll"), batch["ranks"]).chosen
    if "tokens" not in batch:
        return chosen
    return chosen / batch.get("tokens_per_example", batch["tokens"][:, 0].float().mean())
