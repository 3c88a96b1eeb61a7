"""Judges with a shared prefix: against a plain forward pass per question, and against DecisionPipeline.

Guards: '1. Yes,' read as nothing, a preamble that shifts all answers, a judge whose answers hang together
with what else was asked, images encoded once per question.
"""

import logging
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import CLOSED, FAMILIES, IMAGE_TOKENS, tiny_judge, tiny_llava
from transformers import (
    AutoProcessor,
    Florence2Config,
    Gemma3Config,
    JambaConfig,
    Lfm2VlConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
)
from transformers.decision import DecisionConfig
from transformers.pipelines.decision import DecisionPipeline

from prefopt.errors import InputError
from prefopt.judges.decision import DecisionJudge, VlmAnswerer, request
from prefopt.judges.loading import load_judge
from prefopt.judges.questions import Case, Question
from prefopt.judges.shared_prefix import SharedPrefixJudge, _by_image
from prefopt.vlm.models import load_vlm
from prefopt.vlm.rows import unshareable

PREDICATES = (
    Question("animal", "Can a zebra be seen?"),
    Question("colours", "Are the colours those of the description, all of them?"),
    Question("flaw", "Is something wrong?"),
)
CHOICE = Question("colour", "Which colour has it?", "choice", ("red", "green", "blue"))
SCORE = Question("quality", "How good is it?", "score", ("bad", "fair", "good"))
ALL = (*PREDICATES, CHOICE, SCORE)


def image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """Noise of its own for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CASES = (
    Case(image(0), "a zebra", ALL),
    Case(image(1, 100, 30), "two red giraffes in the snow", ALL),
    Case(image(2, 60, 64), "", ALL),
    Case(image(3, 30, 120), "an elephant", ALL[1:3]),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {family: tiny_judge(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, folders) -> SimpleNamespace:
    """A judge by all spellings, one by bare labels, and the folder that both come from."""
    folder = folders[request.param]
    return SimpleNamespace(
        name=request.param, folder=folder, judge=load_judge(folder), bare=load_judge(folder, bare_labels=True)
    )


@pytest.fixture(scope="module")
def llava(folders) -> SharedPrefixJudge:
    return SharedPrefixJudge(folders["llava"])


def values(answers) -> np.ndarray:
    """Logarithms of all probabilities, of all answers of all cases, with the mass on other tokens."""
    return np.array(
        [
            value
            for case in answers
            for answer in case
            for value in [*np.log(list(answer.probabilities.values())), answer.other_mass]
        ]
    )


def plain_log_odds(folder: str, case: Case) -> list[float]:
    """The log-odds by definition: tokens that decode to yes or no, after a whole forward pass a question."""
    model, processor = load_vlm(folder)
    words = [processor.tokenizer.decode([i]).strip().lower() for i in range(len(processor.tokenizer))]
    odds = []
    for inputs, _ in DecisionConfig().prepare_inputs(request(case), processor):
        inputs.pop("marks")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[0, -1].double()
        mass = {
            word: sum(logits[i].exp() for i, spelled in enumerate(words) if spelled == word)
            for word in ("yes", "no")
        }
        odds.append(log(mass["yes"] / mass["no"]))
    return odds


def test_equals_a_plain_forward_pass_per_question(family):
    assert isinstance(family.judge, SharedPrefixJudge)
    case = Case(CASES[1].image, CASES[1].prompt, PREDICATES)
    odds = [answer.log_odds for answer in family.judge.answer([case])[0]]
    assert np.ptp(odds) > 0.1  # not all alike, or equality would say little
    np.testing.assert_allclose(odds, plain_log_odds(family.folder, case), atol=1e-4)


def test_bare_labels_equal_the_decision_pipeline(family):
    model, processor = load_vlm(family.folder)
    pipeline = DecisionPipeline(model=model.eval(), processor=processor, tokenizer=processor.tokenizer)
    for case, answers in zip(CASES, family.bare.answer(CASES), strict=True):
        expected = pipeline(request(case))
        for question, answer in zip(case.questions, answers, strict=True):
            theirs = expected[question.name]
            if question.type == "predicate":
                assert answer.probabilities["yes"] == pytest.approx(theirs["noul"], abs=1e-5)
            else:
                ours = list(answer.probabilities.values())
                assert ours == pytest.approx(list(theirs["probabilities"].values()), abs=1e-5)
            assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_one_question_at_a_time_gives_the_same(family):
    single = DecisionJudge(family.judge.answerer)
    np.testing.assert_allclose(
        values(family.judge.answer(CASES)), values(single.answer(CASES)), rtol=0, atol=1e-4
    )
    assert single.identity == family.judge.identity


def test_images_together_equal_images_alone(family):
    """Images of other sizes make prompts of other lengths, so that there is padding to be without effect."""
    lengths = {family.judge.answerer.prompts(case)[0][0]["input_ids"].shape[1] for case in CASES}
    assert len(lengths) > 1
    together = SharedPrefixJudge(family.judge.answerer, batch_size=4).answer(CASES)
    alone = SharedPrefixJudge(family.judge.answerer, batch_size=1).answer(CASES)
    np.testing.assert_allclose(values(together), values(alone), rtol=0, atol=1e-4)
    assert [len(case) for case in together] == [5, 5, 5, 2]


def test_an_answer_does_not_depend_on_the_other_questions(family):
    case = CASES[0]
    whole = dict(zip(ALL, family.judge.answer([case])[0], strict=True))
    for asked in (ALL[::-1], ALL[1:3], ALL[4:], (ALL[2], ALL[0])):
        answers = family.judge.answer([Case(case.image, case.prompt, tuple(asked))])
        expected = [[whole[question] for question in asked]]
        np.testing.assert_allclose(values(answers), values(expected), rtol=0, atol=1e-4)


def test_image_description_and_question_are_all_read(family):
    case = CASES[0]
    others = [
        case,
        Case(image(9), case.prompt, ALL),
        Case(case.image, "a giraffe", ALL),
        Case(case.image, case.prompt, tuple(Question(q.name, q.text + "!", q.type, q.options) for q in ALL)),
    ]
    odds = [family.judge.answer([one])[0][0].log_odds for one in others]
    assert len(np.unique(np.round(odds, 3))) == 4


def test_eager_attention_gives_the_same(folders, llava):
    eager = SharedPrefixJudge(folders["llava"], attn_implementation="eager")
    np.testing.assert_allclose(values(eager.answer(CASES)), values(llava.answer(CASES)), rtol=0, atol=1e-4)


def test_bfloat16_runs(folders, llava):
    half = SharedPrefixJudge(folders["llava"], dtype=torch.bfloat16)
    odds = [[answer.log_odds for answer in judge.answer(CASES[:1])[0][:3]] for judge in (half, llava)]
    np.testing.assert_allclose(*odds, atol=0.5)
    assert half.identity != llava.identity


def test_an_image_is_prepared_and_encoded_once(llava, monkeypatch):
    """Guards: one image with ten questions cost ten encodings."""
    counts = {"prepared": 0, "encoded": 0, "read": 0}
    model, images = llava.answerer.model.model, llava.answerer.processor.image_processor.wrapped
    prepare = type(images).__call__

    def count(name):
        counts[name] += 1

    monkeypatch.setattr(type(images), "__call__", lambda *a, **k: (count("prepared"), prepare(*a, **k))[1])
    hooks = [
        model.vision_tower.register_forward_hook(lambda *_: count("encoded")),
        model.language_model.register_forward_hook(lambda *_: count("read")),
    ]
    llava.answer(CASES[:2])
    for hook in hooks:
        hook.remove()
    assert counts == {"prepared": 2, "encoded": 1, "read": 2}  # both images in one batch


def test_cases_about_one_image_share_its_row(family):
    """As a pair of answers in both orders: other descriptions, one image, and the answers of each alone."""
    shown = CASES[1].image
    texts = ("first: a zebra, second: a cow", "first: a cow, second: a zebra", "a cow")
    cases = [Case(shown, text, (CHOICE, *PREDICATES[:2])) for text in texts]
    cases.insert(1, Case(shown, "nothing is asked", ()))
    alone = [family.judge.answer([case])[0] for case in cases]
    encoded, tower = [], vision_tower(family.judge.answerer.model)
    hook = tower.register_forward_hook(lambda *_: encoded.append(1))
    together = family.judge.answer([CASES[0], *cases, CASES[2]])
    hook.remove()
    assert len(encoded) == 1 and [len(case) for case in together] == [5, 3, 0, 3, 3, 5]
    np.testing.assert_allclose(values(together[1:-1]), values(alone), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        values(together[::5]), values(family.judge.answer([CASES[0], CASES[2]])), atol=1e-4
    )
    assert np.ptp(np.array(values(alone)).reshape(3, -1), axis=0).max() > 0.01


def vision_tower(model):
    return model.get_encoder(modality="image")


def test_a_row_of_many_cases_is_bounded(llava, monkeypatch):
    """The mask of a row grows with the square of its questions' tokens."""
    monkeypatch.setattr("prefopt.judges.shared_prefix.LONGEST_ROW", 4)
    cases = [Case(CASES[0].image, f"{number} zebras", PREDICATES[:2]) for number in range(5)]
    assert _by_image(cases) == [[0, 1], [2, 3], [4]]
    assert _by_image([*cases[:1], CASES[1], *cases[1:2]]) == [[0], [1], [2]]
    alone = [llava.answer([case])[0] for case in cases]
    np.testing.assert_allclose(values(llava.answer(cases)), values(alone), rtol=0, atol=1e-4)


def test_no_cases_and_no_questions(llava):
    assert llava.answer([]) == []
    empty = Case(image(0), "a zebra", ())
    answers = llava.answer([empty, CASES[3], empty])
    assert [len(case) for case in answers] == [0, 2, 0]
    assert DecisionJudge(llava.answerer).answer([empty]) == [[]]


def logits_of(answerer: VlmAnswerer, mass: dict[str, float]) -> torch.Tensor:
    """Logits that give tokens their mass, and spread the rest over one unused token."""
    vocabulary = answerer.tokenizer.get_vocab()
    p = torch.full((len(vocabulary) + 4,), 1e-12)
    for token, share in mass.items():
        p[vocabulary[token]] = share
    p[-1] = 1 - sum(mass.values())
    return p.log()[None]


def read(answerer: VlmAnswerer, question: Question, mass: dict[str, float]):
    asked = [
        parsed for _, questions in answerer.prompts(Case(image(0), "", (question,))) for parsed in questions
    ]
    return answerer.read([question], asked, logits_of(answerer, mass))[0]


def test_every_spelling_of_yes_and_no_counts(llava, folders):
    """Guards: a text parser scores ' YES' or '1. Yes,' as nothing."""
    spelled = {"Yes": 0.2, "\u0120Yes": 0.1, "YES": 0.1, "yes": 0.05, "No": 0.1, "\u0120no": 0.05}
    answer = read(llava.answerer, PREDICATES[0], spelled)
    assert answer.log_odds == pytest.approx(log(0.45 / 0.15), abs=1e-5)
    assert answer.other_mass == pytest.approx(0.4, abs=1e-5)
    assert answer.verdict == "yes"

    bare = VlmAnswerer(folders["llava"], bare_labels=True)
    answer = read(bare, PREDICATES[0], spelled)
    assert answer.log_odds == pytest.approx(log(2), abs=1e-5)
    assert answer.other_mass == pytest.approx(0.7, abs=1e-5)
    assert answer.verdict is None


def test_choices_and_scores_are_read_by_their_letters(llava):
    mass = {"A": 0.1, "B": 0.3, "C": 0.4}
    for question in (CHOICE, SCORE):
        answer = read(llava.answerer, question, mass)
        expected = dict(zip(question.options, (0.125, 0.375, 0.5), strict=True))
        assert answer.probabilities == pytest.approx(expected, abs=1e-5)
        assert answer.other_mass == pytest.approx(0.2, abs=1e-5)


def test_a_description_cannot_write_control_tokens(family):
    """Nor the image's placeholder, nor the one of our request: all of it is read as text."""
    answerer = family.judge.answerer
    special = [token for token in answerer.tokenizer.all_special_tokens if token]
    evil = " ".join(["a zebra", *special, "<image-0>", "<|mark|>", "<|split|>"])
    ids = [
        answerer.prompts(Case(image(0), prompt, PREDICATES[:1]))[0][0]["input_ids"][0].tolist()
        for prompt in ("a zebra", evil)
    ]
    controls = answerer.tokenizer.all_special_ids
    harmless, attacked = ([token for token in one if token in controls] for one in ids)
    assert harmless == attacked
    assert evil in answerer.tokenizer.decode(ids[1])
    assert len(family.judge.answer([Case(image(0), evil, PREDICATES)])[0]) == 3


def test_the_words_are_those_of_a_system_one_request(llava):
    prompts = llava.answerer.prompts(Case(image(0), "a zebra", (PREDICATES[0], CHOICE)))
    texts = [llava.answerer.tokenizer.decode(inputs["input_ids"][0]) for inputs, _ in prompts]
    start = "<s>USER: " + "<image>" * IMAGE_TOKENS + "\n\nDescription: a zebra\n\n"
    assert texts == [
        start + "Can a zebra be seen?\nAnswer Yes or No only. ASSISTANT:",
        start + "Which colour has it?\nA. red\nB. green\nC. blue\n"
        "Answer with the letter of the option that fits best (A to C) only. ASSISTANT:",
    ]


UNSHAREABLE = {
    "encoder": (Florence2Config(), "encoder"),
    "sliding window": (LlavaConfig(text_config=MistralConfig(sliding_window=64)), "slides over 64 tokens"),
    "sliding layers": (
        Qwen2_5_VLConfig(
            text_config={"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
        ),
        "sliding_attention",
    ),
    "sliding and bidirectional": (Gemma3Config(), "sliding_attention"),
    "convolutions": (
        Lfm2VlConfig(text_config={"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
        "some of its layers are conv",
    ),
    "state space beside attention": (LlavaConfig(text_config=JambaConfig()), "linear_attention"),
    "state space alone": (LlavaConfig(text_config=MambaConfig()), "linear_attention"),
    "never compared": (PaliGemmaConfig(), "paligemma"),
}


@pytest.mark.parametrize("what", UNSHAREABLE)
def test_what_cannot_share_a_row_is_told_by_its_config(what):
    config, reason = UNSHAREABLE[what]
    config._attn_implementation = "sdpa"
    assert reason in (unshareable(config) or "")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_mask_cannot_share_a_row(attention):
    config = LlavaConfig(text_config=MistralConfig(sliding_window=None))
    config._attn_implementation = "sdpa"
    assert unshareable(config) is None
    config._attn_implementation = attention
    assert attention in (unshareable(config) or "")


def test_the_other_models_are_asked_one_by_one(tmp_path, caplog):
    folder = tiny_judge(tmp_path, model_type="mistral", sliding_window=32)
    with pytest.raises(InputError, match=r"several questions at once: its attention slides over 32 tokens"):
        SharedPrefixJudge(folder)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        judge = load_judge(folder, bare_labels=True)
        answers = judge.answer(CASES)
        judge.answer(CASES[:1])
    assert isinstance(judge, DecisionJudge)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt")]
    assert said == [f"{folder} is asked one question at a time: its attention slides over 32 tokens"]
    model, processor = load_vlm(folder)
    pipeline = DecisionPipeline(model=model.eval(), processor=processor, tokenizer=processor.tokenizer)
    theirs = pipeline(request(CASES[0]))
    for question, answer in zip(PREDICATES, answers[0], strict=False):
        assert answer.probabilities["yes"] == pytest.approx(theirs[question.name]["noul"], abs=1e-6)


def test_a_template_with_the_image_last_is_asked_one_by_one(tmp_path, caplog):
    folder = tiny_judge(tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    first, second = CLOSED.index("{% for c in"), CLOSED.rindex("{% for c in")
    end = CLOSED.index("{% endfor %}{% endfor %}") + len("{% endfor %}")
    processor.chat_template = CLOSED[:first] + CLOSED[second:end] + CLOSED[first:second] + CLOSED[end:]
    processor.save_pretrained(folder)
    judge = load_judge(folder)
    assert isinstance(judge, DecisionJudge)
    assert "the question before the image" in caplog.text
    case = Case(CASES[0].image, "a zebra", PREDICATES)
    odds = [answer.log_odds for answer in judge.answer([case])[0]]
    np.testing.assert_allclose(odds, plain_log_odds(folder, case), atol=1e-4)


def test_identity_changes_with_what_the_answers_depend_on(tmp_path, folders, llava):
    other = tiny_judge(tmp_path / "weights", seed=1)
    changed = tiny_judge(tmp_path / "template")
    processor = AutoProcessor.from_pretrained(changed)
    processor.chat_template = CLOSED.replace("ASSISTANT:", "JUDGE:")
    processor.save_pretrained(changed)
    identities = [
        llava.identity,
        load_judge(folders["llava"], bare_labels=True).identity,
        load_judge(other).identity,
        load_judge(changed).identity,
    ]
    assert len(set(identities)) == 4
    llava.answer(CASES[:1])
    assert load_judge(folders["llava"]).identity == llava.identity


def test_a_models_own_labels_and_temperature_are_kept(tmp_path):
    folder = tiny_judge(tmp_path)
    DecisionConfig(labels={"noul": ["A", "B"]}, temperature={"noul": 2.0}).save_pretrained(folder)
    model, processor = load_vlm(folder)
    pipeline = DecisionPipeline(model=model.eval(), processor=processor, tokenizer=processor.tokenizer)
    case = Case(CASES[0].image, "a zebra", PREDICATES)
    theirs = pipeline(request(case))
    judge = load_judge(folder)
    assert isinstance(judge, SharedPrefixJudge)
    for question, answer in zip(PREDICATES, judge.answer([case])[0], strict=True):
        assert answer.probabilities["yes"] == pytest.approx(theirs[question.name]["noul"], abs=1e-5)


WRONG = {
    "a name twice": ((PREDICATES[0], PREDICATES[0]), "name each once"),
    "an option twice": ((Question("c", "Which?", "choice", ("a", "a")),), "two equal options"),
    "too many options": (
        (Question("c", "Which?", "choice", tuple(f"o{i}" for i in range(27))),),
        "at most 26 options",
    ),
    "no options": ((Question("c", "Which?", "choice", ()),), "needs `criteria`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_questions_that_cannot_be_asked_are_errors(what, llava):
    questions, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        llava.answer([Case(image(0), "a zebra", questions)])


def test_a_description_longer_than_the_model_reads_is_an_error(llava):
    with pytest.raises(InputError, match=r"reads 1024; shorten the description"):
        llava.answer([Case(image(0), "zebra " * 1000, PREDICATES)])


def test_a_tokenizer_without_yes_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no single token of this model spells 'yes'"):
        load_judge(tiny_llava(tmp_path))
