"""Vision-language models on the same questions: their answers and losses, and nothing computed twice."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import forget, values
from datasets import Dataset, Features, Image, List, Value
from peft import PeftModel
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, picture, tiny_judge, tiny_vlm
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from vlm_answers import MARK, TOKENS, Scripted, critic, questions_of, run, systems, write_table

from prefopt.errors import InputError
from prefopt.evaluation import answer_scorers, answering
from prefopt.evaluation.answer_scorers import reference_scorers
from prefopt.evaluation.answering import Answered, Answering, read_questions
from prefopt.evaluation.asked import Questions
from prefopt.evaluation.systems import VlmSystem, vlm_systems
from prefopt.evaluation.vision_language import compare
from prefopt.ledger import Ledger
from prefopt.vlm.models import load_vlm

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

# Answers and losses


@pytest.mark.parametrize("system", ["base", "lora1"])
def test_answers_and_losses_are_those_of_transformers_and_peft(vlms, compared_vlms, system) -> None:
    """Each row by itself: transformers' own greedy generate, and log p by a plain forward."""
    _, summary, rows = compared_vlms
    model: Any = AutoModelForImageTextToText.from_pretrained(vlms / "base").eval()
    if system != "base":
        model = PeftModel.from_pretrained(model, str(vlms / system)).eval()
    processor: Any = AutoProcessor.from_pretrained(vlms / "base")
    questions = questions_of(vlms)
    log_p, tokens = [], []
    for row in [row for row in rows if row["system"] == system]:
        asked, ids, found = plain(model, processor, questions, row["row"])
        log_p.append(found)
        tokens.append(len(ids))
        assert row["reference_tokens"] == tokens[-1]
        assert row["log_p"] == pytest.approx(log_p[-1], abs=1e-3)
        with torch.no_grad():
            generated = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0]
        said = processor.decode(generated[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["answer"] == said.strip()
    assert len(set(tokens)) > 2, "or any weights would do"
    assert summary["systems"][system]["means"]["loss"] == pytest.approx(-sum(log_p) / sum(tokens), rel=1e-5)


def test_a_base_in_4_bits_is_the_one_that_qlora_trains_on(vlms, tmp_path) -> None:
    questions, folder = questions_of(vlms), tiny_vlm(tmp_path / "vlm")
    system = VlmSystem(folder, load_in_4bit=True)
    answered = answer(questions, system, tmp_path, 3)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model: Any = load_vlm(folder, quantization=BitsAndBytesConfig(load_in_4bit=True, **options))[0].eval()
    processor = AutoProcessor.from_pretrained(folder)
    for place in range(3):
        _, _, expected = plain(model, processor, questions, place)
        assert answered[place].log_p == pytest.approx(expected, abs=1e-3)
    whole = answer(questions, VlmSystem(folder), tmp_path, 3)
    assert all(abs(one.log_p - other.log_p) > 0.1 for one, other in zip(whole, answered, strict=True))


def test_an_adapter_leaves_nothing_behind(vlms, compared_vlms, tmp_path) -> None:
    """Guards: the base after an adapter that was not taken off, or two adapters at once."""
    named = systems(vlms, 0, 1)
    backwards = {name: named[name] for name in ("lora1", "lora0", "base")}
    summary = compare(backwards, questions_of(vlms), reference_scorers(["a"]), tmp_path, max_new_tokens=2)
    for name, system in compared_vlms[1]["systems"].items():
        assert summary["systems"][name]["means"]["loss"] == pytest.approx(system["means"]["loss"], rel=1e-6)


def answer(questions: Questions, system: VlmSystem, folder: Path, most: int) -> list[Answered]:
    ledger = Ledger(folder, "answers")
    work = Answering(questions, ledger, max_new_tokens=2, batch_size=4, device=torch.device("cpu"))
    return work.run({"": system}, questions.asked[:most])[""]


def plain(model: Any, processor: Any, questions: Questions, place: int) -> tuple[Any, Tensor, float]:
    """A question's row alone: the prompt's inputs, the right answer's tokens, and their log p."""
    one = questions.asked[place]
    asked, said = (
        processor(text=text, images=questions.images(one), return_tensors="pt", add_special_tokens=False)
        for text in (
            processor.apply_chat_template(one.prompt, add_generation_prompt=True),
            processor.apply_chat_template([*one.prompt, one.answer]),
        )
    )
    with torch.no_grad():
        logits = model(**said).logits[0].log_softmax(-1)
    start = asked["input_ids"].shape[1]
    ids = said["input_ids"][0, start:]
    return asked, ids, logits[start - 1 : -1].gather(1, ids[:, None]).sum().item()


# What is kept


def test_a_rerun_answers_and_asks_nothing_again(vlms, words, compared_vlms, tmp_path, monkeypatch) -> None:
    _, whole, _ = compared_vlms
    first = Scripted()
    run(vlms, tmp_path, critic(first, words), 0)
    assert first.asked
    added = Scripted()
    loads, load = [], answering.start_from_lora
    monkeypatch.setattr(answering, "start_from_lora", lambda *a: loads.append(a[1]) or load(*a))
    summary = run(vlms, tmp_path, critic(added, words), 0, 1)
    assert loads == [str(vlms / "lora1")], "the adapter that was added, alone"
    assert not set(first.asked) & set(added.asked)
    assert summary["systems"]["lora1"]["means"] == pytest.approx(whole["systems"]["lora1"]["means"])
    monkeypatch.setattr(answering, "load_vlm", lambda *a, **k: pytest.fail("loaded again"))
    again = Scripted()
    assert run(vlms, tmp_path, critic(again, words), 0, 1) == summary and not again.asked


def test_a_run_that_has_nothing_left_but_what_cannot_be_read_ends(vlms, words, tmp_path) -> None:
    """Guards: a critic that cannot read the last of many replies counts as one that never can."""
    questions = questions_of(vlms)

    def grade(writer: Scripted) -> None:
        scorer = answer_scorers.grade_scorer(critic(writer, words), "scripted", with_reference=True)
        compare(systems(vlms, 0), questions, [scorer], tmp_path, max_new_tokens=TOKENS)

    grade(Scripted())
    kept = tmp_path / "scores-00000.sqlite"
    forget(kept, [next(key for key, said in values(kept).items() if said[""] is None)])
    last = Scripted()
    grade(last)
    (text,) = last.asked
    assert len(text.split(MARK)[1].strip()) % 5 == 0


# Questions


def test_each_answer_of_a_conversation_is_a_question(vlms, tmp_path) -> None:
    said = ["user", "assistant"] * 2
    texts = ["Which animal?", "A lion.", "Which colour?", "It is red."]
    messages = [{"role": role, "content": text} for role, text in zip(said, texts, strict=True)]
    table = [{"images": [picture(i)], "messages": messages} for i in range(2)]
    features = Features(
        images=List(Image()), messages=List({"role": Value("string"), "content": Value("string")})
    )
    (tmp_path / "data").mkdir()
    Dataset.from_list(table, features=features).to_parquet(str(tmp_path / "data" / "test.parquet"))
    questions = read_questions(str(tmp_path / "data"), systems(vlms)["base"])
    assert [one.reference for one in questions.asked] == ["A lion.", "It is red."] * 2
    assert questions.asked[0].question == "Which animal?"
    assert questions.asked[1].question == "user: Which animal?\nassistant: A lion.\nuser: Which colour?"
    assert [one.group for one in questions.asked[:2]] == [questions.asked[0].group] * 2
    assert questions.asked[0].group != questions.asked[2].group
    assert questions.asked[1].where.endswith("row 0, answer 2")
    answered = answer(questions, systems(vlms)["base"], tmp_path, 4)
    model = AutoModelForImageTextToText.from_pretrained(vlms / "base").eval()
    _, _, expected = plain(model, AutoProcessor.from_pretrained(vlms / "base"), questions, 1)
    assert answered[1].log_p == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_compared_is_named(vlms, words, tmp_path, monkeypatch) -> None:
    base = systems(vlms)["base"]
    write_table(tmp_path / "same", [[picture(0)]] * 3)
    questions = read_questions(str(tmp_path / "same"), base)
    with pytest.raises(InputError, match="its 3 questions are all about one image"):
        compare({"base": base, "other": base}, questions, reference_scorers(["a"]), tmp_path)
    write_table(tmp_path / "two", [[picture(0), picture(1)], [picture(2)]])
    with pytest.raises(InputError, match="row 0 has 2 images, and a judge of typed questions is shown one"):
        read_questions(str(tmp_path / "two"), base).check_one_image()
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    answer_scorers._library.cache_clear()
    with pytest.raises(InputError, match=re.escape('pip install "prefopt[evaluate]"')):
        reference_scorers(["a"])


def test_a_whole_model_is_a_system_unless_its_vocabulary_is_another(vlms, tmp_path) -> None:
    base = systems(vlms)["base"]
    named = vlm_systems(["base", f"other={vlms / 'other'}", f"lora={vlms / 'lora0'}"], base)
    assert named["other"].model == str(vlms / "other") and named["lora"].adapter == str(vlms / "lora0")
    questions = read_questions(str(vlms / "data"), base, most=4)
    assert len(questions.asked) == 4
    summary = compare(named, questions, reference_scorers(["a"]), tmp_path, max_new_tokens=4)
    losses = [system["means"]["loss"] for system in summary["systems"].values()]
    assert len(set(losses)) == 3
    tiny_judge(tmp_path / "qwen", "qwen2_5_vl")
    others = {"base": base, "qwen": VlmSystem(str(tmp_path / "qwen"))}
    with pytest.raises(InputError, match=r"has another vocabulary than .*base"):
        compare(others, questions, reference_scorers(["a"]), tmp_path, max_new_tokens=4)
