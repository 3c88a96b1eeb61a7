"""The menu of objectives: each loss on scores worked by hand, what it needs, what the batch brings."""

import math

import pytest
import torch

from prefopt.errors import InputError
from prefopt.objectives import OBJECTIVES, ObjectiveOptions, Scored, objective_of, supervised

BETA = 0.5


class Options(ObjectiveOptions):
    beta = BETA


# Chosen 4 tokens at -1.5 nats each, rejected 2 at -2; the reference 1 nat lower on both.
SCORED = Scored(torch.tensor([[-6.0, -4.0]]), nll=torch.tensor([[6.0, 4.0]]))
REFERENCE = torch.tensor([[-7.0, -5.5]])
BATCH = {"tokens": torch.tensor([[4, 2]])}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


HAND = {
    "dpo": softplus(-BETA * (-2 + 1.5)),
    "ipo": ((-1.5 + 2.0) - (-1.75 + 2.75) - 1 / (2 * BETA)) ** 2,
    "hinge": 1 - BETA * (-2 + 1.5),
    "robust": (0.9 * softplus(0.25) - 0.1 * softplus(-0.25)) / 0.8,
    "cpo": softplus(-BETA * -2) + 6 / 4,
    "simpo": softplus(-(BETA * (-1.5 + 2.0) - 0.5)),
}


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_each_loss_by_hand(loss_type):
    """ipo and simpo on means over tokens; cpo's likelihood over the tokens of the chosen."""
    options = Options(loss_type=loss_type, label_smoothing=0.1 if loss_type == "robust" else 0.0)
    objective = objective_of(options, BETA)
    loss = objective(SCORED, REFERENCE if objective.needs_reference else None, BATCH)
    assert loss.losses.item() == pytest.approx(HAND[loss_type], abs=1e-6)
    assert loss.rewards.shape == (1, 2) and not loss.rewards.requires_grad


def test_without_tokens_scores_are_means_already():
    """A denoising error is a mean over C, H, W: nothing is divided."""
    simpo, cpo = (objective_of(Options(loss_type=name), BETA) for name in ("simpo", "cpo"))
    assert simpo(SCORED, None, {}).losses.item() == pytest.approx(softplus(-(BETA * -2 - 0.5)), abs=1e-6)
    loss = cpo(SCORED, None, {})
    assert loss.losses.item() == pytest.approx(softplus(1.0) + 6, abs=1e-6)
    assert loss.terms["nll/chosen"].item() == 6


def test_options_reach_their_loss():
    weighted = objective_of(Options(loss_type="cpo", likelihood_weight=0.25), BETA)(SCORED, None, BATCH)
    assert weighted.losses.item() == pytest.approx(softplus(1.0) + 0.25 * 1.5, abs=1e-6)
    aimed = objective_of(Options(loss_type="simpo", simpo_gamma=2.0), BETA)(SCORED, None, BATCH)
    assert aimed.losses.item() == pytest.approx(softplus(2.0 - 0.25), abs=1e-6)


def test_the_likelihood_is_a_mean_over_the_step_s_tokens():
    """Two examples of 1 and 9 tokens: their mean is that of ten tokens, not of two examples."""
    scored = Scored(torch.zeros(2, 2), nll=torch.tensor([[2.0, 0.0], [9.0, 0.0]]))
    batch = {"tokens": torch.tensor([[1, 3], [9, 3]])}
    assert supervised()(scored, None, batch).losses.mean().item() == pytest.approx(11 / 10)
    # Of a step of 4 examples and 24 tokens, of which these are two.
    whole = supervised()(scored, None, batch | {"tokens_per_example": torch.tensor(6.0)})
    assert whole.losses.sum().item() / 4 == pytest.approx(11 / 24)


@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
def test_soft_labels_weigh_both_outcomes(loss_type):
    without = {"likelihood_weight": 0.0} if loss_type == "cpo" else {}
    objective = objective_of(Options(loss_type=loss_type, **without), BETA)
    logit = BETA * (-2.0 + 1.5) if loss_type == "dpo" else BETA * -2.0
    loss = objective(SCORED, REFERENCE, BATCH | {"p_chosen": torch.tensor([0.7])})
    assert loss.losses.item() == pytest.approx(0.7 * softplus(-logit) + 0.3 * softplus(logit), abs=1e-6)
    objective.check_labels(True)
    smoothed = objective_of(Options(loss_type=loss_type, label_smoothing=0.1, **without), BETA)
    smoothed.check_labels(False)
    with pytest.raises(InputError, match="leave out --label_smoothing"):
        smoothed.check_labels(True)


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "robust", "simpo"])
def test_a_loss_without_soft_labels_refuses_them(loss_type):
    with pytest.raises(InputError, match="column p_chosen, which this --loss_type cannot use"):
        objective_of(Options(loss_type=loss_type), BETA).check_labels(True)


def test_what_does_not_fit_is_named():
    dpo, cpo = (objective_of(Options(loss_type=name), BETA) for name in ("dpo", "cpo"))
    with pytest.raises(InputError, match="an example here has 3 candidates"):
        cpo(Scored(torch.zeros(1, 3), nll=torch.zeros(1, 3)), None, {})
    with pytest.raises(ValueError, match="got no reference scores"):
        dpo(SCORED, None, BATCH)
    with pytest.raises(InputError, match=r"--loss_type is 'kto'; choose from dpo, ipo"):
        Options(loss_type="kto")
    with pytest.raises(InputError, match="--likelihood_weight is -1"):
        Options(likelihood_weight=-1)
    with pytest.raises(InputError, match="--label_smoothing is for dpo, robust, cpo, not for simpo"):
        Options(loss_type="simpo", label_smoothing=0.1)
    for name, losses in (("likelihood_weight", "cpo"), ("simpo_gamma", "simpo")):
        with pytest.raises(InputError, match=f"--{name} is for {losses}, not for dpo"):
            Options(**{name: 0.25})
