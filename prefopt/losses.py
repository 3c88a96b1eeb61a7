"""Preference objectives: scores in, one loss per example out.

A score is one number per candidate that rises when the model likes the candidate more: on a language side the
sum of log p over the completion's tokens, on a diffusion side minus the denoising error. Every function here
maps tensors of shape (batch,) to losses of shape (batch,): no reduction, no state, no flag that selects
another loss.

beta is plain: it multiplies the margin and nothing else. The Diffusion-DPO code (arXiv 2311.12908) multiplies
by half of its `beta_dpo`; that half is taken where the command line is read, not here.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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


def sft_loss(chosen_nll: Tensor) -> Tensor:
    """Supervised fine-tuning: the chosen's negative log-likelihood or denoising error (batch,), as it is."""
    return chosen_nll


def _rewards(policy: Pair, reference: Pair, beta: float) -> Pair:
    return Pair(beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected))


def _detached(rewards: Pair) -> Pair:
    return Pair(rewards.chosen.detach(), rewards.rejected.detach())
