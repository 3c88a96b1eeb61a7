"""What is measured of answers: against other libraries, by hand, and with a critic whose rule is known."""

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, picture
from vlm_answers import Scripted, Yes, column, critic, questions_of, systems

from prefopt.errors import InputError
from prefopt.evaluation import answer_scorers
from prefopt.evaluation.answer_scorers import corpus_bleu, normalised, reference_scorers
from prefopt.evaluation.vision_language import compare
from prefopt.judges.critic_cases import ScoreCase
from prefopt.judges.rubric import Rubric
from prefopt.loading import Lazy

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

# Words in common with the reference


def test_bleu_and_rouge_are_those_of_their_libraries(compared_vlms) -> None:
    _, summary, rows = compared_vlms
    for system in summary["systems"]:
        said = [(row["answer"], row["reference"]) for row in rows if row["system"] == system]
        answers, references = zip(*said, strict=True)
        bleu = sacrebleu.corpus_bleu(answers, [references]).score
        assert summary["systems"][system]["means"]["bleu"] == pytest.approx(bleu)
        sentences = [sacrebleu.sentence_bleu(answer, [reference]).score for answer, reference in said]
        np.testing.assert_allclose(column(rows, system, "sentence_bleu"), sentences)
        rouge = RougeScorer(["rougeL"])
        longest = [100 * rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in said]
        ascii_only = [answer.isascii() for answer in answers]
        found = column(rows, system, "rouge_l")
        np.testing.assert_allclose(found[ascii_only], np.array(longest)[ascii_only])


def test_words_in_common_by_hand() -> None:
    """4 of 6 words in order, both ways: 66.7. BLEU: 5/6, 3/5, 1/4 and, smoothed, 1/(2 * 3)."""
    found = scores_of("The cat sat on the mat.", "the cat is on that mat")
    assert found["rouge_l"] == pytest.approx(100 * 4 / 6)
    found = scores_of("the cat sat on the mat", "the cat is on the mat")
    assert found["sentence_bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert found["rouge_l"] == pytest.approx(100 * 5 / 6)
    score, signature = corpus_bleu(["the cat sat on the mat", "a"], ["the cat sat on the mat", "b"])
    assert score == pytest.approx(100 * (6 / 7 * 1 * 1 * 1) ** 0.25) and "tok:13a" in signature


def scores_of(answer: str, reference: str) -> dict[str, float]:
    case = ScoreCase([], "", answer, reference)
    return {scorer.name: scorer.score([case])[0] for scorer in reference_scorers([reference])}  # type: ignore


def test_words_of_other_alphabets_count() -> None:
    """Guards: rouge_score drops every letter but a to z, so two equal answers share nothing."""
    assert RougeScorer(["rougeL"]).score("красный слон", "красный слон")["rougeL"].fmeasure == 0
    assert scores_of("красный слон", "красный слон")["rouge_l"] == 100
    assert scores_of("ein großer Bär", "ein grosser Bär")["rouge_l"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("  A zebra.", "a Zebra", True),
        ("Yes!", "yes", True),
        ("3.5 %", "3.5", True),
        ("3.5", "35", False),
        ("-4", "4", False),
        ("2020-2021", "2020 2021", True),
        ("", "yes", False),
    ],
)
def test_an_exact_match_is_one_but_for_case_and_punctuation(answer, reference, equal) -> None:
    assert (normalised(answer) == normalised(reference)) is equal
    assert scores_of(answer, reference)["exact"] is equal


def test_long_references_are_not_matched_as_a_whole(compared_vlms) -> None:
    assert "exact" not in compared_vlms[1]["metrics"]


# Opinions


def letters(row: dict) -> int:
    return len(row["answer"].strip())


def test_a_critic_grades_and_what_it_cannot_is_left_out_of_pairs(compared_vlms) -> None:
    """Guards: a grade that cannot be read becomes 0, and a model is punished for its judge's words."""
    _, summary, rows = compared_vlms
    for row in rows:
        assert row["scores"]["critic"] == (None if letters(row) % 5 == 0 else 7 * letters(row) % 101)
    base, lora = column(rows, "base", "critic"), column(rows, "lora1", "critic")
    both = np.isfinite(base) & np.isfinite(lora)
    assert 0 < (~both).sum() < len(both) - 2
    assert summary["systems"]["base"]["unread"] == {
        "critic": np.isnan(base).sum(),
        "rubric/helpfulness": len(base),
    }
    entry = summary["contrasts"][1]["metrics"]["critic"]
    assert entry["mean"] == pytest.approx(lora[both].mean())
    assert entry["difference"]["mean"] == pytest.approx((lora - base)[both].mean())
    assert sum(entry["wins"][kind] for kind in ("wins", "ties", "losses")) == both.sum()
    assert summary["systems"]["lora1"]["means"]["critic"] == pytest.approx(np.nanmean(lora))


def test_a_preference_counts_if_both_orders_agree(compared_vlms) -> None:
    """Guards: a critic that likes the first place makes a winner of whatever stands there."""
    _, summary, rows = compared_vlms
    by_row = {(row["system"], row["row"]): row for row in rows}
    outcomes, half_sure = [], 0
    for row in rows:
        if row["system"] == "base":
            assert "preference" not in row["scores"]
            continue
        gap = letters(row) - letters(by_row["base", row["row"]])
        expected = 0.5 if abs(gap) <= 2 else float(gap > 0)
        half_sure += abs(gap) == 2
        assert row["scores"]["preference"] == expected, gap
        if row["system"] == "lora1":
            outcomes.append(expected)
    assert {0.0, 0.5, 1.0} == set(outcomes) and half_sure > 1
    system, entry = summary["systems"]["lora1"], summary["contrasts"][1]["metrics"]["preference"]
    assert entry["wins"]["wins"] == outcomes.count(1.0) and entry["wins"]["losses"] == outcomes.count(0.0)
    assert entry["difference"]["mean"] == pytest.approx(2 * np.mean(outcomes) - 1)
    assert system["preferred_longer"] == 1.0, "the critic likes nothing else"
    assert 0 < system["consistent"] < 1
    assert all("preference" not in pair["metrics"] for pair in summary["further"])


def test_equal_answers_tie_without_a_question(vlms, words, tmp_path) -> None:
    writer = Scripted()
    questions = questions_of(vlms)
    preference = answer_scorers.preference_scorer(critic(writer, words), "base", with_reference=True)
    twice = {"base": systems(vlms)["base"], "again": systems(vlms)["base"]}
    summary = compare(
        twice, questions, reference_scorers(["long " * 9]), tmp_path, preference=preference, max_new_tokens=4
    )
    assert not writer.asked
    assert summary["contrasts"][0]["metrics"]["preference"]["wins"]["ties"] == 24


def test_a_rubric_gives_points_and_shares_of_good_answers(compared_vlms) -> None:
    """Yes to three positive ones (one unclear), yes to a negative one, no to the other: 1 + 1 + 0 - 1 + 1."""
    _, summary, rows = compared_vlms
    scores = rows[0]["scores"]
    assert scores["rubric/points"] == 2.0
    assert {name: value for name, value in scores.items() if name.startswith("rubric/")} == {
        "rubric/points": 2.0,
        "rubric/correctness": True,
        "rubric/steerability": True,
        "rubric/helpfulness": None,
        "rubric/no hallucination": False,
        "rubric/no refusal": True,
    }
    means = summary["systems"]["base"]["means"]
    assert means["rubric/no refusal"] == 1.0 and means["rubric/helpfulness"] is None
    assert summary["metrics"]["rubric/no refusal"]["kind"] == "proportion"
    assert "rubric/helpfulness" not in summary["contrasts"][0]["metrics"]


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_rubric_s_judge_sees_image_question_and_answer(with_reference: bool) -> None:
    judge, image = Yes(), picture(3)
    rubric = Rubric.load("answers")
    scorer = answer_scorers.rubric_scorer(Lazy("", lambda: judge), rubric, with_reference=with_reference)
    scorer.score([ScoreCase([image], "Which animal?", "a {lion}", "a zebra")])
    (case,) = judge.cases
    assert case.image is image
    assert "Question: Which animal?" in case.prompt and "Answer: a {lion}" in case.prompt
    assert ("a zebra" in case.prompt) is with_reference
    asked = ["correctness", "steerability", "helpfulness", "hallucination", "refusal"]
    assert [question.name for question in case.questions] == asked
    other = answer_scorers.rubric_scorer(Lazy("", Yes), rubric, with_reference=not with_reference)
    assert other.identity != scorer.identity


def test_a_rubric_for_images_of_a_class_is_refused() -> None:
    with pytest.raises(InputError, match="class_conditional asks about images of a class"):
        answer_scorers.rubric_scorer(Lazy("", Yes), Rubric.load("class_conditional"), with_reference=True)
