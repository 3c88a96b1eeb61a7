"""Preference objectives: scores in, one loss per example out.

A score is one number per candidate that rises when the model likes the candidate more: on a language side the
sum of log p over the completion's tokens, on a diffusion side minus the denoising error. Every function here
maps tensors of shape (batch,), or (batch, k) of ranked lists, to losses of shape (batch,): no reduction, no
state, no flag that selects another loss.

beta is plain: it multiplies the margin and nothing else. The Diffusion-DPO code (arXiv 2311.12908) multiplies
by half of its `beta_dpo`; that half is taken where the command line is read, not here.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


class Pair(NamedTuple):
    """A number for each side of a preference pair."""

    chosen: Tensor  # (batch,)
    rejected: Tensor  # (batch,)

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected, (batch,)."""
        return self.chosen - self.rejected

    @property
    def stacked(self) -> Tensor:
        """Both sides, (batch, 2)."""
        return torch.stack(self, dim=1)


class PreferenceLoss(NamedTuple):
    """What an objective returns."""

    losses: Tensor  # (batch,)
    rewards: Pair  # implicit rewards, beta * (score - reference score), detached


def dpo_loss(
    policy: Pair, reference: Pair, *, beta: float, label_smoothing: float | Tensor = 0.0
) -> PreferenceLoss:
    """Direct preference optimization: -(1-e) log sigmoid(beta D) - e log sigmoid(-beta D), D the margin over
    the reference.

    arXiv 2305.18290 eq. 7; `label_smoothing` e is the conservative variant: in [0, 0.5), or (batch,), 1 minus
    the probability that the chosen is the better one. On diffusion scores at one shared (timestep, noise)
    this is Diffusion-DPO, arXiv 2311.12908 eq. 14.
    """
    rewards = _rewards(policy, reference, beta)
    logits = rewards.margin
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return PreferenceLoss(losses, _detached(rewards))


def ipo_loss(policy: Pair, reference: Pair, *, beta: float) -> PreferenceLoss:
    """Identity preference optimization: (D - 1 / (2 beta))^2; arXiv 2310.12036 eq. 17.

    The scores of a language model are to be averaged over the completion's length first.
    """
    distance = policy.margin - reference.margin - 1 / (2 * beta)
    return PreferenceLoss(distance.square(), _detached(_rewards(policy, reference, beta)))


def hinge_loss(policy: Pair, reference: Pair, *, beta: float) -> PreferenceLoss:
    """The hinge on DPO's margin: max(0, 1 - beta D); arXiv 2305.10425, with the reference of 2309.06657."""
    rewards = _rewards(policy, reference, beta)
    return PreferenceLoss(torch.relu(1 - rewards.margin), _detached(rewards))


def robust_dpo_loss(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> PreferenceLoss:
    """DPO, unbiased when a share e of the labels is flipped; arXiv 2403.00409 eq. 12.

    [-(1-e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e), `label_smoothing` e in [0, 0.5).
    """
    rewards = _rewards(policy, reference, beta)
    logits = rewards.margin
    losses = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return PreferenceLoss(losses / (1 - 2 * label_smoothing), _detached(rewards))


def cpo_loss(
    policy: Pair,
    *,
    beta: float,
    chosen_nll: Tensor,
    likelihood_weight: float = 1.0,
    label_smoothing: float | Tensor = 0.0,
) -> PreferenceLoss:
    """Contrastive preference optimization: DPO without a reference, plus the likelihood of the chosen; arXiv
    2401.08417 eq. 6.

    `chosen_nll` (batch,) is the negative log-likelihood of the chosen, already normalised as the caller wants
    it; on a diffusion model it is the ordinary denoising error.
    """
    logits = beta * policy.margin
    preference = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    rewards = Pair(beta * policy.chosen, beta * policy.rejected)
    return PreferenceLoss(preference + likelihood_weight * chosen_nll, _detached(rewards))


def simpo_loss(policy: Pair, *, beta: float, gamma: float) -> PreferenceLoss:
    """Simple preference optimization: -log sigmoid(beta m - gamma); arXiv 2405.14734 eq. 6.

    The scores are to be averaged over the completion's length first.
    """
    rewards = Pair(beta * policy.chosen, beta * policy.rejected)
    return PreferenceLoss(-logsigmoid(rewards.margin - gamma), _detached(rewards))


class ListLoss(NamedTuple):
    """What an objective on ranked lists returns."""

    losses: Tensor  # (batch,)
    rewards: Tensor  # (batch, k), beta * (score - reference score), detached; 0 where a list was padded


def plackett_luce_loss(
    policy: Tensor, ranks: Tensor, *, beta: float, reference: Tensor | None = None
) -> ListLoss:
    """The negative log-probability of a ranking: at each place, the one that stands there is picked among
    itself and all that are ranked below it.

    -sum_j [r_j - logsumexp over j and all i ranked below j of r_i], r = beta (score - reference score);
    Plackett-Luce as in arXiv 2305.18290, appendix A.3; without a reference, CPO on lists. `policy`,
    `reference` and `ranks` are (batch, k); rank 1 is the best, equal ranks are a tie, about which nothing is
    said, and 0 is a padded place.
    """
    scores = policy if reference is None else policy - reference
    rewards = (beta * scores).masked_fill(ranks == 0, 0.0)
    better = _better(ranks)
    itself = torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    rivals = rewards[:, None, :].masked_fill(~(better | itself), -torch.inf)
    # What has nothing below it has no rival but itself, and adds 0; so does a padded place.
    losses = (rivals.logsumexp(2) - rewards).sum(1)
    return ListLoss(losses, rewards.detach())


PairWeights = Literal["uniform", "adjacent", "dcg"]


def rank_dpo_loss(
    policy: Tensor,
    ranks: Tensor,
    *,
    beta: float,
    reference: Tensor | None = None,
    weights: PairWeights = "uniform",
) -> ListLoss:
    """DPO on every two candidates of a list of which one is ranked higher: a weighted mean over these pairs.

    `weights` are those of `pair_weights`; shapes and ranks as in `plackett_luce_loss`. Since it is a mean, a
    list counts no more for being long; one in which all tie has loss 0.
    """
    sides = every_pair(policy, ranks), every_pair(torch.zeros_like(policy), ranks)
    if reference is not None:
        sides = sides[0], every_pair(reference, ranks)
    return over_pairs(dpo_loss(*sides, beta=beta), ranks, weights)


def every_pair(scores: Tensor, ranks: Tensor) -> Pair:
    """Scores (batch, k) as those of all pairs [i, j], i chosen and j rejected, each side (batch, k, k).

    A padded place has the score 0 and no gradient.
    """
    scores = scores.masked_fill(ranks == 0, 0.0)
    return Pair(*torch.broadcast_tensors(scores[:, :, None], scores[:, None, :]))


def over_pairs(outcome: PreferenceLoss, ranks: Tensor, weights: PairWeights) -> ListLoss:
    """The weighted mean of any pair loss that was computed of `every_pair`."""
    losses = outcome.losses * pair_weights(ranks, weights, outcome.losses.dtype)
    return ListLoss(losses.sum((1, 2)), outcome.rewards.chosen[:, :, 0])


def guard_winner(scores: Pair, residuals: Tensor, mu: float) -> Pair:
    """The scores of `every_pair`, with a rejected side's gradient scaled so that, to first order, a step does
    not raise the error of its chosen side; arXiv 2511.03317, in the space of the network's outputs.

    `residuals` (batch, k, ...) are prediction minus target. The scale of the pair [i, j] is (1 - mu) times
    |r_i|^2 / <r_i, r_j> where that is under 1 and the two point the same way, else 1; `mu` in [0, 1) is how
    much is kept in reserve. The values stay what they are.
    """
    flat = residuals.detach().flatten(2)
    alike = flat @ flat.mT
    own = alike.diagonal(dim1=1, dim2=2)[:, :, None]
    scale = ((1 - mu) * own / alike.clamp(min=torch.finfo(alike.dtype).tiny)).clamp(max=1)
    scale = scale.where(alike > 0, 1)
    still = scores.rejected.detach()
    return Pair(scores.chosen, still + scale * (scores.rejected - still))


def pair_weights(ranks: Tensor, weights: PairWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """(batch, k, k): the weight of the pair [i, j], i ranked above j; 0 for any other, 1 in all for a list.

    `uniform`: all pairs alike. `adjacent`: those alone between whose ranks no other lies. `dcg`: by what the
    list's discounted cumulative gain loses if the two change places, so that the top counts most. That is the
    difference of their gains 2^relevance - 1, relevance falling from 1 at the best rank to 0 at the worst,
    times that of their discounts 1 / log2(1 + rank); after LiPO, arXiv 2402.01878.
    """
    better = _better(ranks)
    weight = better.to(dtype)
    if weights == "adjacent":
        weight = weight * (weight @ weight == 0)
    elif weights == "dcg":
        worst = ranks.amax(1, keepdim=True)
        gain = 2 ** ((worst - ranks) / (worst - 1).clamp(min=1)).to(dtype)
        discount = 1 / torch.log2(1 + ranks.clamp(min=1).to(dtype))
        weight = weight * (gain[:, :, None] - gain[:, None]) * (discount[:, :, None] - discount[:, None])
    elif weights != "uniform":
        raise ValueError(f"weights are {', '.join(get_args(PairWeights))}, not {weights!r}")
    total = weight.sum((1, 2), keepdim=True)
    return weight / total.where(total > 0, 1)


def mapo_loss(errors: Pair, *, beta: float, snr: float = 0.5, steps: int = 1000) -> PreferenceLoss:
    """Margin-aware preference optimization: the chosen's error, and beta times a margin that needs no
    reference; arXiv 2406.06424.

    errors_w - beta log sigmoid(steps * (phi(errors_w) - phi(errors_l))), phi(e) = snr e / (exp(snr e) - 1),
    which falls from 1 as the denoising error e grows; `snr` and `steps` as in the authors' code.
    """
    exponents = [snr * error.clamp(min=1e-12) for error in errors]  # 0 / 0 has no limit in floats
    soft = Pair(*(exponent / torch.expm1(exponent) for exponent in exponents))
    losses = errors.chosen - beta * logsigmoid(steps * soft.margin)
    return PreferenceLoss(losses, _detached(Pair(steps * soft.chosen, steps * soft.rejected)))


def realism_loss(logits: Tensor) -> Tensor:
    """What a generator pays for looking generated: softplus(-d) of a discriminator's logits d, any shape.

    The loss without saturation of arXiv 1406.2661, section 3.
    """
    return softplus(-logits)


def discriminator_loss(logits: Tensor, real: Tensor, there: Tensor) -> Tensor:
    """What a discriminator pays, (batch,): the mean of softplus(-d) over the real candidates and that of
    softplus(d) over the others, half each; logits, `real` and `there` (the places to count) are (batch, k).

    An example with no candidate of one kind counts the other alone; one without any has loss 0.
    """
    losses = softplus(logits.where(~real, -logits))
    kinds = torch.stack([real & there, ~real & there])  # (2, batch, k)
    means = (losses * kinds).sum(2) / kinds.sum(2).clamp(min=1)
    return means.sum(0) / kinds.any(2).sum(0).clamp(min=1)


def best_and_worst(values: Tensor, ranks: Tensor) -> Pair:
    """The means of values (batch, k) over the candidates of the best rank and of the worst, each (batch,)."""
    last = ranks.amax(1, keepdim=True)
    return Pair(*(values.masked_fill(ranks != rank, 0).sum(1) / (ranks == rank).sum(1) for rank in (1, last)))


def reward_metrics(rewards: Tensor, ranks: Tensor) -> dict[str, Tensor]:
    """What is logged of rewards (batch, k) under trl's names, (batch,) each.

    Of a list, `chosen` and `rejected` are those of the best rank and of the worst, and the accuracy is the
    share of its pairs whose better candidate has the higher reward; a tie of rewards counts one half.
    """
    pair, margins = best_and_worst(rewards, ranks), every_pair(rewards, ranks).margin
    right = (margins > 0).to(rewards.dtype) + 0.5 * (margins == 0)
    return {
        "rewards/chosen": pair.chosen,
        "rewards/rejected": pair.rejected,
        "rewards/margins": pair.margin,
        "rewards/accuracies": (right * pair_weights(ranks, "uniform", rewards.dtype)).sum((1, 2)),
    }


def sft_loss(chosen_nll: Tensor) -> Tensor:
    """Supervised fine-tuning: the chosen's negative log-likelihood or denoising error (batch,), as it is."""
    return chosen_nll


def _rewards(policy: Pair, reference: Pair, beta: float) -> Pair:
    return Pair(beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected))


def _detached(rewards: Pair) -> Pair:
    return Pair(rewards.chosen.detach(), rewards.rejected.detach())


def _better(ranks: Tensor) -> Tensor:
    """(batch, k, k): whether candidate i is ranked above j, both being there."""
    there = ranks > 0
    return (ranks[:, :, None] < ranks[:, None]) & there[:, :, None] & there[:, None]
