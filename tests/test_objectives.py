"""The menu of objectives: each loss on scores worked by hand, what it needs, what the batch brings."""

import math

import pytest
import torch

from prefopt.errors import InputError
from prefopt.objectives import ObjectiveOptions, Scored, objective_of, supervised

BETA = 0.5


class Options(ObjectiveOptions):
    beta = BETA


# Chosen 4 tokens at -1.5 nats each, rejected 2 at -2; the reference 1 nat lower on both.
SCORED = Scored(torch.tensor([[-6.0, -4.0]]), nll=torch.tensor([[6.0, 4.0]]))
REFERENCE = torch.tensor([[-7.0, -5.5]])
RANKS = {"ranks": torch.tensor([[1, 2]])}
BATCH = {"tokens": torch.tensor([[4, 2]]), **RANKS}


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


@pytest.mark.parametrize("loss_type", HAND)
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
    assert simpo(SCORED, None, RANKS).losses.item() == pytest.approx(softplus(-(BETA * -2 - 0.5)), abs=1e-6)
    loss = cpo(SCORED, None, RANKS)
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
    batch = {"tokens": torch.tensor([[1, 3], [9, 3]]), "ranks": torch.tensor([[1, 2], [1, 2]])}
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
    dpo = objective_of(Options(), BETA)
    with pytest.raises(ValueError, match="needs the candidates' reference scores, and got none"):
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
    for options in ({"winner_guard": 1.0}, {"winner_guard": -0.1}):
        with pytest.raises(InputError, match="--winner_guard is"):
            Options(**options)
    ranking = {"list_loss": "plackett_luce"}
    for name, value in (("label_smoothing", 0.1), ("pair_weights", "dcg"), ("winner_guard", 0.0)):
        with pytest.raises(InputError, match=f"--{name} is for --list_loss pairs"):
            Options(**ranking, **{name: value})
    with pytest.raises(InputError, match="--list_loss is for dpo, cpo, not for ipo"):
        Options(loss_type="ipo", **ranking)


# Lists


LISTS = {"ranks": torch.tensor([[1, 2, 3], [1, 1, 3], [1, 2, 0]])}
OF_LISTS = torch.tensor([[-1.0, -3.0, -2.0], [-2.0, -4.0, -1.0], [-1.5, -2.5, 0.0]], dtype=torch.float64)
REFERENCE_OF_LISTS = torch.tensor([[-2.0, -2.5, -2.0], [-3.0, -3.0, -1.0], [-2.5, -2.0, 0.0]]).double()
PAIRS_OF_LISTS = ([(0, 1), (0, 2), (1, 2)], [(0, 2), (1, 2)], [(0, 1)])


@pytest.mark.parametrize("loss_type", HAND)
def test_every_pair_loss_serves_lists_as_the_mean_over_their_pairs(loss_type):
    options = Options(loss_type=loss_type, label_smoothing=0.1 if loss_type == "robust" else 0.0)
    objective = objective_of(options, BETA)
    found = objective(Scored(OF_LISTS, nll=-OF_LISTS), REFERENCE_OF_LISTS, LISTS)
    for row, pairs in enumerate(PAIRS_OF_LISTS):
        alone = []
        for i, j in pairs:
            scores, reference = OF_LISTS[row, [i, j]][None], REFERENCE_OF_LISTS[row, [i, j]][None]
            # The likelihood is the best candidate's, whichever pair it is.
            best = OF_LISTS[row, LISTS["ranks"][row] == 1].mean()
            nll = -torch.stack([best, scores[0, 1]])[None]
            alone.append(objective(Scored(scores, nll=nll), reference, RANKS).losses)
        torch.testing.assert_close(found.losses[row], torch.cat(alone).mean(), rtol=1e-12, atol=0)
    assert found.rewards.shape == (3, 3) and found.rewards[2, 2] == 0


@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
def test_the_likelihood_of_a_ranking(loss_type):
    options = Options(loss_type=loss_type, list_loss="plackett_luce")
    objective = objective_of(options, BETA)
    assert objective.needs_reference == (loss_type == "dpo")
    loss = objective(Scored(OF_LISTS, nll=-OF_LISTS), REFERENCE_OF_LISTS, LISTS)
    scores = OF_LISTS[0] - (REFERENCE_OF_LISTS[0] if loss_type == "dpo" else 0)
    first, second, third = (BETA * score for score in scores.tolist())
    by_hand = math.log(sum(map(math.exp, (first, second, third)))) - first
    by_hand += math.log(math.exp(second) + math.exp(third)) - second
    by_hand += 1.0 if loss_type == "cpo" else 0  # the best one's nll
    assert loss.losses[0].item() == pytest.approx(by_hand, rel=1e-12)
    if loss_type == "cpo":
        assert loss.terms["nll/chosen"].tolist() == [1.0, 3.0, 1.5], "of two best ones their mean"
    with pytest.raises(InputError, match="p_chosen, which this --loss_type cannot use"):
        objective.check_labels(True)


@pytest.mark.parametrize("loss_type", ["dpo", "cpo"])
@pytest.mark.parametrize("list_loss", ["pairs", "plackett_luce"])
def test_a_list_of_two_is_a_pair(loss_type, list_loss):
    plain = objective_of(Options(loss_type=loss_type), BETA)(SCORED, REFERENCE, BATCH)
    listed = objective_of(Options(loss_type=loss_type, list_loss=list_loss), BETA)(SCORED, REFERENCE, BATCH)
    torch.testing.assert_close(listed.losses, plain.losses, rtol=1e-6, atol=0)


def test_mapo_by_hand():
    """Errors 0.2 and 0.4; phi(e) = snr e / (exp(snr e) - 1), snr 0.5, 1000 steps."""

    def soft(error: float) -> float:
        return 0.5 * error / math.expm1(0.5 * error)

    residual = torch.tensor([0.2, 0.4], dtype=torch.float64).sqrt().view(1, 2, 1, 1, 1).expand(1, 2, 4, 2, 2)
    objective = objective_of(Options(loss_type="mapo"), 0.1)
    loss = objective(Scored(torch.zeros(1, 2), residual=residual), None, RANKS)
    margin = 1000 * (soft(0.2) - soft(0.4))
    assert margin > 0
    assert loss.losses.item() == pytest.approx(0.2 + 0.1 * softplus(-margin), rel=1e-12)
    swapped = objective(Scored(torch.zeros(1, 2), residual=residual.flip(1)), None, RANKS)
    assert swapped.losses.item() == pytest.approx(0.4 + 0.1 * softplus(margin), rel=1e-12)
    assert not objective.needs_reference and objective.needs == {"residual"}


def test_the_winner_guard_scales_the_losers_gradient_alone():
    """Guards: a higher winner error is rewarded. Residuals at an angle: (1, 0) of the winner, (2, 1) of the
    loser, whose own step would raise the winner's error; a third points away from it."""
    residual = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [-1.0, 1.0]]]).view(1, 3, 2, 1, 1)
    for mu, scale in ((0.0, 0.5), (0.5, 0.25)):
        scores = torch.tensor([[-1.0, -1.2, -0.9]], requires_grad=True)
        scored = Scored(scores, residual=residual)
        ranks = {"ranks": torch.tensor([[1, 2, 0]])}
        guarded = objective_of(Options(winner_guard=mu), BETA)(scored, torch.zeros(1, 3), ranks)
        plain = objective_of(Options(), BETA)(scored, torch.zeros(1, 3), ranks)
        assert guarded.losses.item() == plain.losses.item(), "the value stays"
        (free,) = torch.autograd.grad(plain.losses.sum(), scores, retain_graph=True)
        (held,) = torch.autograd.grad(guarded.losses.sum(), scores)
        assert held[0, 0] == free[0, 0] and held[0, 1].item() == pytest.approx(scale * free[0, 1].item())
    scores = torch.tensor([[-1.0, -1.2, -0.9]], requires_grad=True)
    ranks = {"ranks": torch.tensor([[1, 0, 3]])}
    away = objective_of(Options(winner_guard=0.0), BETA)(Scored(scores, residual=residual), scores * 0, ranks)
    (held,) = torch.autograd.grad(away.losses.sum(), scores)
    assert held[0, 2] == -held[0, 0], "what points away is left alone"


def test_the_winner_guard_keeps_the_winners_error_from_rising():
    """A linear model of one shared weight matrix: one step along the gradient, with the guard and without."""
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 6, generator=chance, dtype=torch.float64)
    inputs[1] = inputs[0] + 0.1 * inputs[1]  # the loser is much like the winner
    targets = torch.stack([inputs[0, :3], 3 * inputs[0, :3]])
    errors = {}
    for mu in (None, 0.2):
        weight = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
        residual = inputs @ weight - targets
        scores = -residual.square().mean(1)[None]
        scored = Scored(scores, residual=residual.view(1, 2, 3, 1, 1))
        objective = objective_of(Options(winner_guard=mu), BETA)
        objective(scored, torch.zeros(1, 2, dtype=torch.float64), RANKS).losses.sum().backward()
        stepped = inputs @ (weight - 1e-4 * weight.grad).detach() - targets
        errors[mu] = (stepped[0].square().mean() + scores[0, 0].detach()).item()
    assert errors[None] > 0, "without the guard the step raises the winner's error"
    assert errors[0.2] < 0
