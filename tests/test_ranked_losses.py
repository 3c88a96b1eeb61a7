"""Objectives on ranked lists: brute force over all rankings, pairs as lists of two, ties, padded places."""

import math
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.losses import (
    ListLoss,
    Pair,
    dpo_loss,
    pair_weights,
    plackett_luce_loss,
    rank_dpo_loss,
)

BETA = 0.7
WEIGHTS = ("uniform", "adjacent", "dcg")
LOSSES = ("plackett_luce", *WEIGHTS)


def numbers(seed: int, *shape: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance, dtype=torch.float64).mul(2)


def loss(name: str, policy: Tensor, ranks: Tensor, reference: Tensor | None = None) -> ListLoss:
    if name == "plackett_luce":
        return plackett_luce_loss(policy, ranks, beta=BETA, reference=reference)
    return rank_dpo_loss(policy, ranks, beta=BETA, reference=reference, weights=name)


# By hand, and by brute force


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_ranking_has_the_probability_of_its_picks_and_all_rankings_that_of_one(count):
    rewards = numbers(0, count)
    total = 0.0
    for order in permutations(range(count)):
        picked = math.prod(
            math.exp(BETA * rewards[order[place]]) / sum(math.exp(BETA * rewards[i]) for i in order[place:])
            for place in range(count)
        )
        ranks = torch.tensor([[order.index(i) + 1 for i in range(count)]])
        found = math.exp(-plackett_luce_loss(rewards[None], ranks, beta=BETA).losses.item())
        assert found == pytest.approx(picked, rel=1e-12)
        total += found
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Rewards 2, 0, 1 at ranks 1, 2, 3: log(e^2 + 1 + e) - 2 and log(1 + e).
        ("plackett_luce", math.log(math.exp(2) + 1 + math.e) - 2 + math.log(1 + math.e)),
        ("uniform", (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.e)) / 3),
        ("adjacent", (math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2),
    ],
)
def test_values_worked_by_hand(name, value):
    policy = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64) / BETA
    assert loss(name, policy, torch.tensor([[1, 2, 3]])).losses.item() == pytest.approx(value, rel=1e-12)


def test_dcg_weighs_by_what_a_swap_would_cost():
    root, third = 2**0.5, 1 / math.log2(3)
    cost = {(0, 1): (2 - root) * (1 - third), (0, 2): 1 * (1 - 0.5), (1, 2): (root - 1) * (third - 0.5)}
    weights = pair_weights(torch.tensor([[1, 2, 3]]), "dcg", torch.float64)[0]
    for pair in combinations(range(3), 2):
        assert weights[pair].item() == pytest.approx(cost[pair] / sum(cost.values()), rel=1e-12)
    assert weights.sum().item() == pytest.approx(1) and not weights.tril().any()


@pytest.mark.parametrize("reference", [None, numbers(2, 6, 2)], ids=["alone", "with a reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_list_of_two_is_a_pair(name, reference):
    policy = numbers(1, 6, 2)
    as_pair = Pair(*(torch.zeros_like(policy) if reference is None else reference).unbind(1))
    expected = dpo_loss(Pair(*policy.unbind(1)), as_pair, beta=BETA)
    found = loss(name, policy, torch.tensor([[1, 2]]).expand(6, 2), reference)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.rewards, expected.rewards.stacked, rtol=1e-12, atol=0)
    swapped = loss(
        name,
        policy.flip(1),
        torch.tensor([[2, 1]]).expand(6, 2),
        None if reference is None else reference.flip(1),
    )
    torch.testing.assert_close(swapped.losses, expected.losses, rtol=1e-12, atol=0)


# Properties


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_in_which_candidates_are_written_does_not_matter(name):
    policy, ranks = numbers(3, 1, 5), torch.tensor([[1, 2, 2, 4, 5]])
    expected = loss(name, policy, ranks).losses
    for order in list(permutations(range(5)))[::7]:
        found = loss(name, policy[:, order], ranks[:, order]).losses
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_padded_place_changes_nothing_and_gets_no_gradient(name):
    short, ranks = numbers(4, 1, 3), torch.tensor([[2, 1, 3]])
    expected = loss(name, short, ranks)
    for filler in (0.0, 1e30, torch.nan, -torch.inf):
        padded = torch.cat([short[:, :1], torch.full((1, 2), filler), short[:, 1:]], 1).requires_grad_()
        found = loss(name, padded, torch.tensor([[2, 0, 0, 1, 3]]))
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)
        assert found.rewards[0].tolist() == [expected.rewards[0, 0], 0, 0, *expected.rewards[0, 1:]]
        found.losses.sum().backward()
        assert padded.grad is not None and not padded.grad[0, 1:3].any()
        assert padded.grad[0, [0, 3, 4]].isfinite().all() and padded.grad.sum().abs() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_a_tie_says_nothing_about_the_two(name):
    """No loss depends on which of two tied candidates is scored higher; where all tie there is none."""
    policy = numbers(5, 1, 4)
    assert loss(name, policy, torch.tensor([[1, 1, 1, 1]])).losses.item() == 0
    assert loss(name, policy, torch.tensor([[3, 0, 0, 0]])).losses.item() == 0, "one candidate"
    ranks, swapped = torch.tensor([[1, 2, 2, 4]]), policy[:, [0, 2, 1, 3]]
    torch.testing.assert_close(loss(name, swapped, ranks).losses, loss(name, policy, ranks).losses)
    # The best and the tied alone: each tied one is only compared with the best.
    scores = policy.clone().requires_grad_()
    loss(name, scores, torch.tensor([[0, 1, 1, 2]])).losses.sum().backward()
    one, other = (torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 2]))
    apart = [loss(name, policy, ranks[None]).losses for ranks in (one, other)]
    both = loss(name, policy, torch.tensor([[0, 1, 1, 2]])).losses
    torch.testing.assert_close(both, sum(apart) if name == "plackett_luce" else sum(apart) / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_each_list_stands_alone_and_a_better_order_costs_less(name):
    policy, ranks = numbers(6, 5, 4), 1 + numbers(9, 5, 4).argsort(1)
    together = loss(name, policy, ranks).losses
    for i in range(5):
        assert loss(name, policy[[i]], ranks[[i]]).losses.item() == pytest.approx(
            together[i].item(), rel=1e-12
        )
    sorted_scores = policy.sort(1, descending=True).values.gather(1, ranks - 1)
    assert (loss(name, sorted_scores, ranks).losses <= together + 1e-12).all()


def test_uniform_is_the_mean_over_the_pairs_one_by_one():
    policy, reference, ranks = (
        numbers(7, 3, 4),
        numbers(8, 3, 4),
        torch.tensor([[1, 2, 3, 4], [2, 2, 1, 0], [4, 1, 1, 3]]),
    )
    rewards = BETA * (policy - reference)
    for row, rank in enumerate(ranks.tolist()):
        pairs = [(i, j) for i, j in permutations(range(4), 2) if 0 < rank[i] < rank[j]]
        expected = torch.stack([-logsigmoid(rewards[row, i] - rewards[row, j]) for i, j in pairs]).mean()
        found = rank_dpo_loss(policy, ranks, beta=BETA, reference=reference).losses[row]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_other_weights_are_an_error():
    with pytest.raises(ValueError, match="uniform, adjacent, dcg, not 'all'"):
        rank_dpo_loss(numbers(0, 1, 2), torch.tensor([[1, 2]]), beta=BETA, weights="all")  # pyright: ignore
