"""Every objective: trl's as an oracle, a value worked by hand, examples that stand alone, sides that swap."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

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

BETA, SMOOTHING, GAMMA = 0.7, 0.15, 0.4
LN2 = math.log(2)


def numbers(seed: int, count: int = 5) -> Pair:
    chance = torch.Generator().manual_seed(seed)
    return Pair(*torch.randn(2, count, generator=chance, dtype=torch.float64).mul(2))


POLICY, REFERENCE = numbers(0), numbers(1)
NLL = -POLICY.chosen

# With or without a reference, each as a function of (policy, reference).
WITH_REFERENCE: dict[str, Callable[[Pair, Pair], PreferenceLoss]] = {
    "dpo": partial(dpo_loss, beta=BETA),
    "conservative dpo": partial(dpo_loss, beta=BETA, label_smoothing=SMOOTHING),
    "ipo": partial(ipo_loss, beta=BETA),
    "hinge": partial(hinge_loss, beta=BETA),
    "robust": partial(robust_dpo_loss, beta=BETA, label_smoothing=SMOOTHING),
}
WITHOUT_REFERENCE: dict[str, Callable[[Pair, Pair], PreferenceLoss]] = {
    "cpo": lambda policy, _: cpo_loss(policy, beta=BETA, chosen_nll=-policy.chosen, likelihood_weight=0.3),
    "conservative cpo": lambda policy, _: cpo_loss(
        policy, beta=BETA, chosen_nll=-policy.chosen, label_smoothing=SMOOTHING
    ),
    "simpo": lambda policy, _: simpo_loss(policy, beta=BETA, gamma=GAMMA),
}
ALL = WITH_REFERENCE | WITHOUT_REFERENCE


def trl_dpo(name: str, policy: Pair, reference: Pair) -> Tensor:
    """The losses of trl's DPOTrainer, one example at a time, on completions of a single token."""
    kind = {"dpo": "sigmoid", "conservative dpo": "aot"}.get(name, name)  # aot sorts a batch: here of one
    losses = []
    for i in range(len(policy.chosen)):
        trainer = MagicMock(
            loss_types=[kind],
            loss_weights=[1.0],
            beta=BETA,
            label_smoothing=SMOOTHING,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            precompute_ref_logps=True,
            aux_loss_enabled=False,
            use_weighting=False,
        )
        trainer.accelerator.gather_for_metrics = lambda values: values
        scores = torch.stack([policy.chosen[i], policy.rejected[i]])[:, None]
        metrics = {"entropy": scores, "mean_logits": scores, "is_top1": scores > 0}
        model = MagicMock(return_value=SimpleNamespace(log_probs=scores, **metrics))
        inputs = {
            "input_ids": torch.ones(2, 2, dtype=torch.long),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1], [0, 1]]),
            "ref_chosen_logps": reference.chosen[i : i + 1],
            "ref_rejected_logps": reference.rejected[i : i + 1],
        }
        losses.append(DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))
    return torch.stack(losses)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_equals_trl_with_a_reference(name):
    outcome = WITH_REFERENCE[name](POLICY, REFERENCE)
    torch.testing.assert_close(outcome.losses, trl_dpo(name, POLICY, REFERENCE), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*experimental:Warning")  # trl calls its CPO trainer experimental
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", SMOOTHING), ("simpo", 0.0)])
def test_equals_trl_without_a_reference(kind, smoothing):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        loss_type=kind,
        beta=BETA,
        label_smoothing=smoothing,
        simpo_gamma=GAMMA,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *POLICY)
    if kind == "simpo":
        ours = simpo_loss(POLICY, beta=BETA, gamma=GAMMA)
    else:
        ours = cpo_loss(POLICY, beta=BETA, chosen_nll=NLL, likelihood_weight=0.0, label_smoothing=smoothing)
        weighted = cpo_loss(
            POLICY, beta=BETA, chosen_nll=NLL, likelihood_weight=0.25, label_smoothing=smoothing
        )
        torch.testing.assert_close(weighted.losses, losses + 0.25 * NLL, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.losses, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.rewards, Pair(chosen, rejected), rtol=0, atol=1e-12)


# One pair by hand: chosen -1 and rejected -3 by the policy, -2 and -2.5 by the reference, beta 0.5.
# margin 2, reference margin 0.5, D = 1.5, logit beta D = 0.75.
HAND = Pair(torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64))
HAND_REFERENCE = Pair(torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-2.5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # log(1 + e^-0.75) = log(1 + 0.4723665527) = log 1.4723665527
        (dpo_loss(HAND, HAND_REFERENCE, beta=0.5), 0.3868710),
        # 0.9 * 0.3868710 + 0.1 * log(1 + e^0.75), which is 0.3868710 + 0.75 = 1.1368710
        (dpo_loss(HAND, HAND_REFERENCE, beta=0.5, label_smoothing=0.1), 0.4618710),
        # (1.5 - 1 / (2 * 0.5))^2 = 0.5^2
        (ipo_loss(HAND, HAND_REFERENCE, beta=0.5), 0.25),
        # 1 - 0.75
        (hinge_loss(HAND, HAND_REFERENCE, beta=0.5), 0.25),
        # (0.9 * 0.3868710 - 0.1 * 1.1368710) / 0.8 = (0.3481839 - 0.1136871) / 0.8
        (robust_dpo_loss(HAND, HAND_REFERENCE, beta=0.5, label_smoothing=0.1), 0.2931210),
        # logit 0.5 * 2 = 1: log(1 + e^-1) = 0.3132617, plus 2 * the error 1 of the chosen
        (cpo_loss(HAND, beta=0.5, chosen_nll=-HAND.chosen, likelihood_weight=2.0), 2.3132617),
        # logit 1 - 0.25 = 0.75, as for dpo
        (simpo_loss(HAND, beta=0.5, gamma=0.25), 0.3868710),
    ],
    ids=["dpo", "conservative dpo", "ipo", "hinge", "robust", "cpo", "simpo"],
)
def test_a_value_worked_by_hand(loss, value):
    assert loss.losses.item() == pytest.approx(value, abs=1e-7)


def test_rewards_by_hand():
    """0.5 * (-1 + 2) and 0.5 * (-3 + 2.5); without a reference 0.5 times -1 and -3."""
    for outcome in (dpo_loss(HAND, HAND_REFERENCE, beta=0.5), hinge_loss(HAND, HAND_REFERENCE, beta=0.5)):
        assert [reward.item() for reward in outcome.rewards] == [0.5, -0.25]
        assert outcome.rewards.margin.item() == 0.75
    assert [reward.item() for reward in simpo_loss(HAND, beta=0.5, gamma=1.0).rewards] == [-0.5, -1.5]


def test_supervised_loss_is_the_error_itself():
    error = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert torch.equal(sft_loss(error), error)


@pytest.mark.parametrize("name", ALL)
def test_each_example_stands_alone(name):
    """Guards: a mean over the batch inside log sigmoid."""
    together = ALL[name](POLICY, REFERENCE)
    assert together.losses.shape == together.rewards.chosen.shape == (5,)
    for i in range(5):
        alone = ALL[name](*(Pair(*(side[i : i + 1] for side in pair)) for pair in (POLICY, REFERENCE)))
        assert torch.equal(alone.losses, together.losses[i : i + 1])
        assert torch.equal(alone.rewards.margin, together.rewards.margin[i : i + 1])


@pytest.mark.parametrize("name", ALL)
def test_swapping_the_sides_negates_the_rewards(name):
    outcome = ALL[name](POLICY, REFERENCE)
    swapped = ALL[name](*(Pair(pair.rejected, pair.chosen) for pair in (POLICY, REFERENCE)))
    assert torch.equal(swapped.rewards.margin, -outcome.rewards.margin)
    assert not torch.allclose(swapped.losses, outcome.losses)


@pytest.mark.parametrize("name", ALL)
def test_a_better_chosen_lowers_the_loss(name):
    """Guards: a higher error of the winner is rewarded, by a sign. A score is minus the error."""
    even = numbers(2).chosen  # with no margin yet, every loss has a slope
    policy = Pair(even.clone().requires_grad_(), even.clone().requires_grad_())
    chosen, rejected = torch.autograd.grad(ALL[name](policy, Pair(even, even)).losses.sum(), policy)
    assert (chosen < 0).all() and (rejected > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_rewards_carry_no_gradient(name):
    policy = Pair(*(side.clone().requires_grad_() for side in POLICY))
    assert not ALL[name](policy, REFERENCE).rewards.margin.requires_grad


def test_a_policy_that_is_its_reference_has_the_loss_ln_2():
    for smoothing in (0.0, 0.3):
        outcome = dpo_loss(POLICY, POLICY, beta=2500.0, label_smoothing=smoothing)
        torch.testing.assert_close(
            outcome.losses, torch.full((5,), LN2, dtype=torch.float64), rtol=0, atol=1e-15
        )
        assert not outcome.rewards.margin.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_extreme_logits_stay_finite(name, dtype):
    """At |logit| = 1e4 losses and gradients are finite, and the log sigmoid is the logit itself."""
    scores = torch.tensor([1e4, -1e4], dtype=dtype) / BETA
    policy = Pair(scores.clone().requires_grad_(), torch.zeros_like(scores).requires_grad_())
    zero = Pair(torch.zeros_like(scores), torch.zeros_like(scores))
    losses = ALL[name](policy, zero).losses
    slopes = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
    if name == "dpo":
        assert losses.tolist() == [0.0, pytest.approx(1e4)]


def test_label_smoothing_at_its_limits():
    """At 0 the plain loss; at 1/2 the labels say nothing and a won pair costs what a lost one does."""
    plain = dpo_loss(POLICY, REFERENCE, beta=BETA).losses
    assert torch.equal(dpo_loss(POLICY, REFERENCE, beta=BETA, label_smoothing=0.0).losses, plain)
    torch.testing.assert_close(
        robust_dpo_loss(POLICY, REFERENCE, beta=BETA, label_smoothing=0.0).losses, plain, rtol=0, atol=0
    )
    blind = [
        dpo_loss(*sides, beta=BETA, label_smoothing=0.5).losses
        for sides in ((POLICY, REFERENCE), (Pair(*POLICY[::-1]), Pair(*REFERENCE[::-1])))
    ]
    torch.testing.assert_close(*blind)


def test_robust_is_unbiased_under_flipped_labels():
    """Averaged over labels that are flipped with chance e, it is the DPO loss of the true labels."""
    swapped = [Pair(*pair[::-1]) for pair in (POLICY, REFERENCE)]
    robust = partial(robust_dpo_loss, beta=BETA, label_smoothing=SMOOTHING)
    average = (1 - SMOOTHING) * robust(POLICY, REFERENCE).losses + SMOOTHING * robust(*swapped).losses
    torch.testing.assert_close(average, dpo_loss(POLICY, REFERENCE, beta=BETA).losses, rtol=0, atol=1e-12)


def test_beta_is_plain():
    """It multiplies the margin and nothing else: neither halved nor doubled here."""
    expected = -logsigmoid(3.0 * (POLICY.margin - REFERENCE.margin))
    torch.testing.assert_close(dpo_loss(POLICY, REFERENCE, beta=3.0).losses, expected, rtol=0, atol=1e-12)
