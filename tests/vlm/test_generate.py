"""Answers: as transformers' `generate` gives them when greedy; functions of seed and item when sampled."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from scipy.stats import chisquare
from tiny_vlm import FAMILIES, LLAVA_1_5, PEFT_ON_TRANSFORMERS_5, tiny_judge, tiny_llava
from transformers.generation.logits_process import TopPLogitsWarper

from prefopt.errors import InputError
from prefopt.vlm.generate import Request, Sampling, generate, nucleus, sample_token
from prefopt.vlm.models import load_vlm

LENGTH = 10


def image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """Noise of its own for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(item: int | str, text: str, *images: Image.Image) -> Request:
    blocks = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Request(images, [{"role": "user", "content": blocks}], item)


# Prompts of several lengths, so that there is padding; with one image, two, and none.
REQUESTS = (
    request(0, "What animal is it?", image(0)),
    request(1, "Which colour has it, and what is there beside it?", image(1, 100, 30)),
    request(2, "What is different?", image(2, 60, 64), image(3)),
    request(3, "Which colour has a zebra?"),
)


class Answering:
    """A model with its processor, and the token ids of what it last answered, as they were decoded."""

    def __init__(self, folder: str):
        model, processor = load_vlm(folder)
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.decode = self.processor.tokenizer.decode
        self.processor.tokenizer.decode = self._decode
        self.ids: list[list[int]] = []

    def _decode(self, ids, **options):
        self.ids.append(list(ids))
        return self.decode(ids, **options)

    def __call__(self, requests=REQUESTS, *, model=None, max_new_tokens=LENGTH, **options):
        self.ids = []
        return generate(
            model or self.model, self.processor, requests, max_new_tokens=max_new_tokens, **options
        )

    def inputs(self, one: Request, start: str = "") -> Any:
        """What transformers' own processor makes of one prompt."""
        text = self.processor.apply_chat_template(one.prompt, tokenize=False, add_generation_prompt=True)
        images = [list(one.images)] if one.images else None
        return self.processor(
            text=[start + text], images=images, return_tensors="pt", add_special_tokens=False
        )

    def stock(self, one: Request, *, model: Any = None, start: str = "") -> list[int]:
        """What transformers' own greedy generation says to one prompt, its end included."""
        inputs = self.inputs(one, start)
        made = (model or self.model).generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
        return made[0, inputs["input_ids"].shape[1] :].tolist()

    def end_with(self, *tokens: int) -> None:
        self.model.generation_config.eos_token_id = [self.processor.tokenizer.eos_token_id, *tokens]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Answering]:
    return {family: Answering(tiny_judge(tmp_path_factory.mktemp(family), family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request, loaded):
    answering = loaded[request.param]
    yield answering
    answering.end_with()


@pytest.fixture
def llava(loaded):
    yield loaded["llava"]
    loaded["llava"].end_with()


# Greedy


def test_greedy_is_what_generate_says_token_by_token(family):
    """Positions on three axes and images of several tiles included; the stock answers come one at a time."""
    expected = [family.stock(one) for one in REQUESTS]
    [zero, one, *_] = family(temperature=0.0)
    assert family.ids == expected and len({tuple(ids) for ids in expected}) == len(REQUESTS)
    assert [zero[0].tokens, one[0].finished] == [LENGTH, False]


def test_answers_end_one_after_another(family):
    """Rows leave the batch at several steps; what stays goes on as before."""
    greedy = [family.stock(one) for one in REQUESTS]
    family.end_with(greedy[1][2], greedy[2][5])
    expected = [family.stock(one) for one in REQUESTS]
    assert len({len(ids) for ids in expected}) > 1
    answers = [answer for (answer,) in family(temperature=0.0)]
    assert any(answer.finished for answer in answers)
    ends = set(family.model.generation_config.eos_token_id)
    assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]
    assert [answer.finished for answer in answers] == [ids[-1] in ends for ids in expected]
    assert family.ids == [ids[:-1] if ids[-1] in ends else ids for ids in expected]


def test_a_template_without_bos_gets_one(tmp_path):
    """Guards: LLaVA-1.5's template writes no BOS, and its model never saw a text without one."""
    answering = Answering(tiny_llava(tmp_path, template=LLAVA_1_5))
    answering(REQUESTS[:2], temperature=0.0)
    assert answering.ids == [answering.stock(one, start="<s>") for one in REQUESTS[:2]]
    assert answering.ids != [answering.stock(one) for one in REQUESTS[:2]]


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
def test_an_adapter_takes_part_unless_it_is_off(tmp_path):
    answering = Answering(tiny_judge(tmp_path))
    bare = [answering.stock(one) for one in REQUESTS]
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(answering.model, config).eval()
    answering(model=model, temperature=0.0)
    assert answering.ids == [answering.stock(one, model=model) for one in REQUESTS] != bare
    with model.disable_adapter():
        answering(model=model, temperature=0.0)
    assert answering.ids == bare


# Sampled


def test_an_answer_does_not_depend_on_its_neighbours(family):
    options = {"answers": 3, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    expected = family(**options)
    assert len({answer.text for answers in expected for answer in answers}) == 3 * len(REQUESTS)
    for batch_size in (1, 3):
        assert family(batch_size=batch_size, **options) == expected
    assert family(REQUESTS[::-1], **options) == expected[::-1]
    [alone] = family(REQUESTS[2:3], **(options | {"answers": 1}))
    assert alone == expected[2][:1], "nor on how many answers there are"


def test_an_answer_depends_on_seed_item_and_number(llava):
    def said(item: int | str, **options) -> list[str]:
        [answers] = llava([request(item, "What animal is it?", image(0))], answers=2, **options)
        return [answer.text for answer in answers]

    texts = [*said(0), *said(1), *said(0, seed=1), *said("a row"), *said("another")]
    assert len(set(texts)) == 10
    assert said(0) == texts[:2] and said("a row") == texts[6:8]


def test_first_tokens_come_as_often_as_the_model_says(llava):
    """Through prefill, cache and sampler: 4,000 answers to one prompt against its next token's softmax."""
    one = REQUESTS[0]
    with torch.no_grad():
        p = (llava.model(**llava.inputs(one)).logits[0, -1].double() / 0.7).softmax(0).numpy()
    llava([one], answers=4000, temperature=0.7, max_new_tokens=1)
    end = llava.processor.tokenizer.eos_token_id  # which is not decoded
    counts = np.bincount([ids[0] if ids else end for ids in llava.ids], minlength=len(p))
    common = p * 4000 > 8
    observed, expected = [*counts[common], counts[~common].sum()], [*p[common], p[~common].sum()]
    assert common.sum() > 20
    assert chisquare(observed, np.array(expected) * 4000).pvalue > 1e-3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.6)])
def test_tokens_come_as_often_as_they_should(temperature, top_p):
    logits = np.random.default_rng(0).normal(0, 1.5, 12).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / temperature)
    p = nucleus(p / p.sum(), top_p)
    p /= p.sum()
    chance, sampling = np.random.default_rng(1), Sampling(temperature, top_p)
    counts = np.bincount([sample_token(logits, chance, sampling) for _ in range(8000)], minlength=12)
    assert not counts[p == 0].any()
    assert chisquare(counts[p > 0], p[p > 0] * 8000).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    warper: Any = TopPLogitsWarper(top_p)
    for seed in range(20):
        logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 1 + seed, 300))
        kept = warper(None, logits[None])[0].isfinite()
        np.testing.assert_array_equal(nucleus(logits.softmax(0).numpy(), top_p) > 0, kept)


def test_a_change_in_the_last_bits_seldom_changes_a_token():
    """Against an inverse CDF, where it moves all thresholds: it changes one token in thirty here."""
    changed = {"race": 0, "cdf": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, 32000).astype(np.float32)
        other = (logits + rng.normal(0, 1e-4, 32000)).astype(np.float32)
        race = [sample_token(x, np.random.default_rng(seed), Sampling()) for x in (logits, other)]
        sums = [np.exp(x.astype(np.float64)).cumsum() for x in (logits, other)]
        u = np.random.default_rng(seed).random()
        cdf = [int(np.searchsorted(cumulated / cumulated[-1], u)) for cumulated in sums]
        changed["race"] += race[0] != race[1]
        changed["cdf"] += cdf[0] != cdf[1]
    assert changed["race"] == 0 and changed["cdf"] >= 2


# What it costs


def test_one_prefill_and_one_encoding_for_all_answers(family):
    """Guards: n samples of a prompt cost n prefills, and n encodings of its image."""
    names = ("vision_tower", "visual", "vision_model")
    tower = next(getattr(family.model.model, name) for name in names if hasattr(family.model.model, name))
    seen: dict[str, list] = {"tower": [], "reader": []}
    reader = family.model.get_decoder()
    hooks = [
        tower.register_forward_hook(lambda *_: seen["tower"].append(1)),
        reader.register_forward_pre_hook(
            lambda _, args, given: seen["reader"].append(tuple(given["inputs_embeds"].shape[:2])),
            with_kwargs=True,
        ),
    ]
    family(REQUESTS, answers=3, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert len(seen["tower"]) == 1
    (rows, length), *steps = seen["reader"]
    assert rows == len(REQUESTS) and length > 10
    assert len(steps) == 3 and all(width == 1 and count <= 3 * len(REQUESTS) for count, width in steps)


# Where answers end, and what cannot be answered


def test_a_text_is_without_special_tokens_and_white_space(llava):
    tokenizer = llava.processor.tokenizer
    said = tokenizer(" It is a zebra.", add_special_tokens=False).input_ids
    script = [*said, tokenizer.bos_token_id, tokenizer.eos_token_id, 7]

    def scripted(module, args, output):
        output.logits = torch.full_like(output.logits, -10.0)
        output.logits[:, -1, script[len(steps)]] = 10.0
        steps.append(1)
        return output

    steps: list[int] = []
    hook = llava.model.register_forward_hook(scripted)
    [[answer]] = llava(REQUESTS[:1], temperature=0.0, max_new_tokens=50)
    hook.remove()
    assert (answer.text, answer.tokens, answer.finished) == ("It is a zebra.", len(said) + 2, True)


def test_an_answer_ends_where_the_models_positions_do(tmp_path):
    answering = Answering(tiny_judge(tmp_path, max_position_embeddings=48))
    short, long = request(0, "?"), request(1, "What animal is it and which colour has it?", image(0))
    answers = [answer for (answer,) in answering([long, short], temperature=0.0, max_new_tokens=100)]
    lengths = [answering.inputs(one)["input_ids"].shape[1] for one in (long, short)]
    assert [answer.tokens for answer in answers] == [48 - length for length in lengths]
    assert not any(answer.finished for answer in answers)
    with pytest.raises(InputError, match=r"item 7: the prompt takes \d+ tokens, and the model reads 48"):
        answering([short, request(7, "What animal is it?" * 9)], max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": 2, "temperature": 0.0}, "2 answers at temperature 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"answers": 0}, "answers 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ],
)
def test_options_without_meaning_are_refused(llava, options, message):
    with pytest.raises(InputError, match=message):
        llava(**options)


def test_what_cannot_be_answered_is_named(llava, tmp_path):
    with pytest.raises(InputError, match=r"item 4 has 1 images, but the chat template writes 0 placeholders"):
        llava([Request([image(0)], [{"role": "user", "content": [{"type": "text", "text": "?"}]}], 4)])
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        llava(model=llava.model.train())
    llava.model.eval()

    def overflow(module, args, output):
        output.logits = output.logits * float("nan")
        return output

    hook = llava.model.register_forward_hook(overflow)
    with pytest.raises(InputError, match="logits are no numbers"):
        llava(temperature=0.0)
    hook.remove()
    assert llava([]) == []
