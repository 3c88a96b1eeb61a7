"""Completion scores of shared rows and of the plain batch: against what a model says of each answer alone.

Guards: prompts and images that are read again for every answer, a completion that sees the other one,
padding, neighbours or order that change a score, text-only rows beside rows with images (trl #6547), one
prompt with three images (LLaMA-Factory #9119).
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import FAMILIES, PEFT_ON_TRANSFORMERS_5, tiny_judge
from torch import Tensor, nn

from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.reference import adapters_off
from prefopt.vlm import scoring
from prefopt.vlm.batches import Collator
from prefopt.vlm.chat import Encoder
from prefopt.vlm.models import add_lora, load_vlm
from prefopt.vlm.scoring import CompletionScore, check_head
from prefopt.vlm.trees import PromptPositions

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

LAYOUTS = {"plain": None, "shared": 0, "packed": 2000}  # tokens of a row


def noise(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def example(item: int, images: Sequence[Image.Image], question: str, *answers: str) -> dict[str, Any]:
    """An example as `VisionExamples` gives it."""
    blocks = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return {
        "item": item,
        "where": f"row {item}",
        "images": list(images),
        "image_key": "+".join(str(hash(image.tobytes())) for image in images),
        "prompt": [{"role": "user", "content": blocks}],
        "completions": [
            [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in answers
        ],
        "p_chosen": None,
    }


SQUARE, WIDE, TALL = noise(0), noise(1, 100, 30), noise(2, 30, 90)
EXAMPLES = (
    example(0, [SQUARE], "What is it?", "It is a red cat.", "No."),
    example(1, [SQUARE], "What is it, and where?", "Here.", "It stands over there, by the lake."),
    example(2, [WIDE], "Which?", "Yes", "A dog, I think, perhaps."),
    example(3, [], "Say something.", "Something.", "No, I will not."),
    example(4, [SQUARE, WIDE, TALL], "Are they alike?", "Yes, alike.", "Not at all alike."),
    example(5, [SQUARE], "What is it?", "A cow.", "Two cows in the snow."),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {family: tiny_judge(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, folders) -> SimpleNamespace:
    model, processor = load_vlm(folders[request.param])
    return SimpleNamespace(
        name=request.param, folder=folders[request.param], model=model.eval(), processor=processor
    )


@pytest.fixture(scope="module")
def llava(folders) -> SimpleNamespace:
    model, processor = load_vlm(folders["llava"])
    return SimpleNamespace(model=model.eval(), processor=processor)


def collator(family: Any, layout: str = "shared") -> Collator:
    room = LAYOUTS[layout]
    if room is None:
        return Collator(family.processor)
    return Collator(family.processor, positions=PromptPositions(family.model), row_tokens=room)


def scored(family: Any, layout: str, examples: Sequence[Any], *, frozen: bool = True) -> Tensor:
    score, batch = CompletionScore(frozen_vision=frozen), collator(family, layout)(examples)
    return score(family.model, score.prepare(family.model, batch)).scores


def alone(family: Any) -> tuple[Tensor, Tensor]:
    """Log p of every answer by a forward pass of its own, from all logits in float64; numbers of tokens."""
    encode, scores, tokens = Encoder(family.processor), [], []
    for one in EXAMPLES:
        prompt, completions = encode(one)
        for completion in completions:
            ids = torch.tensor([prompt.ids + completion.ids])
            kinds = {n: torch.tensor([k + [0] * len(completion.ids)]) for n, k in prompt.kinds.items()}
            logits = family.model(input_ids=ids, **kinds, **prompt.images).logits[0].double()
            log_p = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[-len(completion.ids) :]
            scores.append(log_p.sum())
            tokens.append(len(completion.ids))
    return torch.stack(scores).view(-1, 2), torch.tensor(tokens).view(-1, 2)


def gradients(model: nn.Module, scores: Tensor) -> Tensor:
    """The gradient of a sum of the scores in which each has another weight."""
    model.zero_grad()
    (scores * torch.linspace(0.2, 1, scores.numel(), dtype=scores.dtype).view_as(scores)).sum().backward()
    found = [p.grad.flatten() for p in model.get_decoder().parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_gradients_are_those_of_answers_read_alone(family, layout: str) -> None:
    """Log p within 1e-5 a token, gradients within 1e-4 of their length; padded, several pairs to an image."""
    expected, tokens = alone(family)
    found = scored(family, layout, EXAMPLES)
    assert ((found - expected) / tokens).abs().max() < 1e-5
    assert expected.std() > 1  # or nothing could be told apart
    wanted = gradients(family.model, expected)
    assert (gradients(family.model, found) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_each_image_is_encoded_once_and_each_prompt_read_once(family, layout: str) -> None:
    """Guards: trl's eight encodings for two pairs."""
    batch = collator(family, layout)(EXAMPLES)
    assert batch["counts"] == [1, 1, 3]
    calls, forward = [], family.model.model.get_image_features
    family.model.model.get_image_features = lambda *given, **named: (
        calls.append(given) or forward(*given, **named)
    )
    try:
        score = CompletionScore(frozen_vision=True)
        prepared = score.prepare(family.model, batch)
        for _ in range(2):  # policy and reference
            score(family.model, prepared)
    finally:
        del family.model.model.get_image_features
    assert len(calls) == 1
    encode = Encoder(family.processor)
    ids = [encode(one) for one in EXAMPLES]
    answers = sum(len(completion.ids) for one in ids for completion in one.completions)
    image = family.processor.image_token_id
    placeholders = [one.prompt.ids.count(image) for one in ids]
    read = int((batch["segment"] >= 0).sum())
    # Rows 0, 1 and 5 show the same image.
    assert (batch["input_ids"] == image).sum() == sum(placeholders) - 2 * placeholders[0]
    assert read < sum(len(one.prompt.ids) for one in ids) + answers - 2 * placeholders[0]


def test_a_trained_tower_gets_its_gradient(llava) -> None:
    """Full fine-tuning encodes the images in the model's forward."""
    llava.model.zero_grad()
    score, batch = CompletionScore(), collator(llava)(EXAMPLES)
    prepared = score.prepare(llava.model, batch)
    assert prepared is batch
    score(llava.model, prepared).scores.sum().backward()
    tower = llava.model.model.vision_tower
    found = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
    llava.model.zero_grad()
    alone(llava)[0].sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
    assert wanted.norm() > 0
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_examples_stand_alone_in_any_order(llava, layout: str) -> None:
    """A batch of text-only and image rows gives each the score it has alone."""
    with torch.no_grad():
        together = scored(llava, layout, EXAMPLES)
        order = [4, 2, 0, 1, 3, 5]
        shuffled = scored(llava, layout, [EXAMPLES[i] for i in order])
        each = torch.cat([scored(llava, layout, [one]) for one in EXAMPLES])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(each, together, rtol=0, atol=1e-4)


def test_eager_attention_scores_alike(family) -> None:
    eager = SimpleNamespace(processor=family.processor)
    eager.model = load_vlm(family.folder, attn_implementation="eager")[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(
            scored(eager, "packed", EXAMPLES), scored(family, "packed", EXAMPLES), rtol=0, atol=1e-4
        )


def test_activation_checkpointing_changes_nothing(folders) -> None:
    found = []
    for checkpointing in (False, True):
        base, processor = load_vlm(folders["llava"])
        torch.manual_seed(1)
        model = add_lora(base, LoraArguments(lora_r=4, lora_alpha=8)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        setting = SimpleNamespace(model=base, processor=processor)
        score, batch = CompletionScore(frozen_vision=True), collator(setting)(EXAMPLES)
        scores = score(model, score.prepare(model, batch)).scores
        found.append((scores.detach(), gradients(base, scores)))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[0][1].norm()


def test_logits_are_made_in_chunks(llava, monkeypatch) -> None:
    """The same scores and gradients when no more than three tokens' logits exist at once."""
    whole = scored(llava, "shared", EXAMPLES)
    wanted = gradients(llava.model, whole)
    head, most = llava.model.get_output_embeddings(), []
    monkeypatch.setattr(scoring, "LOGITS", 3 * head.weight.shape[0])
    ordinary = head.forward
    head.forward = lambda hidden: most.append(len(hidden)) or ordinary(hidden)
    try:
        found = scored(llava, "shared", EXAMPLES)
        assert (gradients(llava.model, found) - wanted).norm() < 1e-5 * wanted.norm()
    finally:
        del head.forward
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert max(most) == 3
    assert len(most) > 2 * len(EXAMPLES)
    assert "forward" not in vars(head)


def test_dropout_is_the_policy_s_alone(folders) -> None:
    """Guards `disable_dropout`, which makes the adapter's dropout dead, and a reference with dropout."""
    base, processor = load_vlm(folders["llava"])
    model = add_lora(base, LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    score, batch = CompletionScore(), collator(SimpleNamespace(model=base, processor=processor))(EXAMPLES)
    with torch.no_grad():
        assert not torch.equal(score(model, batch).scores, score(model, batch).scores)
        with adapters_off(model) as reference:
            first = score(reference, batch).scores
            assert torch.equal(first, score(reference, batch).scores)
        untouched = load_vlm(folders["llava"])[0].eval()
        torch.testing.assert_close(first, score(untouched, batch).scores, rtol=0, atol=1e-5)


def test_the_reference_sees_the_image(folders) -> None:
    """Guards: a reference forward without the image (trl #5939); here its scores move with the picture."""
    base, processor = load_vlm(folders["llava"])
    model = add_lora(base, LoraArguments(lora_r=4, lora_alpha=8)).train()
    score, collate = (
        CompletionScore(frozen_vision=True),
        collator(SimpleNamespace(model=base, processor=processor)),
    )
    other = {**EXAMPLES[0], "images": [WIDE], "image_key": "wide"}
    with torch.no_grad(), adapters_off(model) as reference:
        one, two = (
            score(reference, score.prepare(model, collate([row]))).scores for row in (EXAMPLES[0], other)
        )
    assert (one - two).abs().min() > 0.1


def test_all_answers_of_a_conversation_are_scored(llava) -> None:
    """And the user's turns between them are read, but not scored."""
    turns = example(0, [SQUARE], "What is it?", "A cat.")
    more = [("user", "And where?"), ("assistant", "By the lake, I think.")]
    turns["completions"][0] += [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in more
    ]
    batch = collator(llava)([turns])
    text = llava.processor.tokenizer.decode(batch["targets"])
    assert text == " A cat.</s> By the lake, I think.</s>"
    whole = torch.tensor([llava.processor.tokenizer.encode("</s>", add_special_tokens=False)[0]])
    assert (batch["input_ids"] == whole).sum() == 2
    logits = llava.model(input_ids=batch["input_ids"], **Encoder(llava.processor)(turns).prompt.images).logits
    log_p = logits[0].log_softmax(-1)[batch["places"]].gather(1, batch["targets"][:, None]).sum()
    torch.testing.assert_close(scored(llava, "shared", [turns])[0, 0], log_p, rtol=0, atol=1e-4)


def test_a_head_without_the_last_word_is_refused(llava) -> None:
    config = SimpleNamespace(final_logit_softcapping=30.0)
    wrapped: Any = SimpleNamespace(model_type="other", get_text_config=lambda decoder: config)
    with pytest.raises(InputError, match=r"other changes its logits .*final_logit_softcapping is 30"):
        check_head(wrapped)
    check_head(llava.model.config)


def test_batches_need_equally_many_answers(llava, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"examples of \[1, 2\] completions"):
        collator(llava)([EXAMPLES[0], example(9, [], "What?", "That.")])
