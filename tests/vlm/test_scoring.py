"""Completion scores: the right tokens, whatever the padding and the order of the batch."""

import pytest
import torch
from tiny_vlm import tiny_llava, vision_pairs
from torch import Tensor, nn

from prefopt.vlm.chat import PairCollator
from prefopt.vlm.models import load_vlm
from prefopt.vlm.pairs import VisionPairs
from prefopt.vlm.scoring import CompletionScore

completion_score = CompletionScore()
Setup = tuple[nn.Module, PairCollator, VisionPairs]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    model, processor = load_vlm(tiny_llava(tmp_path_factory.mktemp("llava")))
    return model.eval(), PairCollator(processor), VisionPairs(vision_pairs(), "rows")


def average_scores(model: nn.Module, batch: dict) -> Tensor:
    return completion_score(model, batch).scores / batch["tokens"]


def scores(setup: Setup, rows: list[int]) -> Tensor:
    model, collator, examples = setup
    with torch.no_grad():
        return completion_score(model, collator([examples[i, 0] for i in rows])).scores


def test_scores_are_the_sum_over_the_completion(setup: Setup) -> None:
    """Against the log-softmax of all logits, in float64."""
    model, collator, examples = setup
    batch = collator([examples[i, 0] for i in range(4)])
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        log_p = model(**inputs).logits.double().log_softmax(dim=-1)
    each = (
        log_p[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2) * batch["completion_mask"][:, 1:]
    )
    expected = each.sum(dim=1)
    found = completion_score(model, batch).scores.detach()
    assert found.shape == (4, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), torch.stack([expected[:4], expected[4:]], dim=1), rtol=0, atol=1e-4
    )
    lengths = batch["completion_mask"].sum(dim=1)
    torch.testing.assert_close(
        average_scores(model, batch)[:, 1].double(), expected[4:] / lengths[4:], rtol=1e-6, atol=0
    )


def test_examples_stand_alone_in_any_order(setup: Setup) -> None:
    together = scores(setup, [0, 1, 2, 3, 4])
    torch.testing.assert_close(scores(setup, [4, 2, 0, 1, 3]), together[[4, 2, 0, 1, 3]], rtol=0, atol=1e-4)
    alone = torch.cat([scores(setup, [i]) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("left", "right"), [(0, 7), (5, 0), (3, 2)])
def test_padding_changes_nothing(setup: Setup, left: int, right: int) -> None:
    model, collator, examples = setup
    batch = collator([examples[i, 0] for i in range(3)])
    padded = dict(batch)
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("completion_mask", 0)):
        padded[name] = nn.functional.pad(batch[name], (left, right), value=value)
    with torch.no_grad():
        found, expected = average_scores(model, padded), average_scores(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_the_completion_is_scored(setup: Setup) -> None:
    """The score does not move with a token after the completion, and does with its last one."""
    model, collator, examples = setup
    batch = collator([examples[0, 0]])
    end = int(batch["attention_mask"][0].sum()) - 1
    after, last = {k: v.clone() for k, v in batch.items()}, {k: v.clone() for k, v in batch.items()}
    longest = int(batch["attention_mask"].sum(dim=1).argmin())
    after["input_ids"][longest, -1] = 50  # padding
    last["input_ids"][0, end] = 50
    with torch.no_grad():
        expected = completion_score(model, batch).scores
        assert torch.equal(completion_score(model, after).scores, expected)
        assert completion_score(model, last).scores[0, 0] != expected[0, 0]


def test_a_model_that_knows_no_logits_to_keep_scores_alike(setup: Setup) -> None:
    model, collator, examples = setup

    class Whole(nn.Module):
        def forward(self, logits_to_keep: Tensor, **inputs: Tensor):
            return model(**inputs)

    batch = collator([examples[i, 0] for i in range(3)])
    with torch.no_grad():
        expected = completion_score(model, batch).scores
        torch.testing.assert_close(completion_score(Whole(), batch).scores, expected, rtol=0, atol=1e-4)
