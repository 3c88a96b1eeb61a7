"""What is measured of a model's answers: words in common with the reference, a critic's grade, a rubric.

BLEU and ROUGE-L are those of sacrebleu and rouge_score, in 0..100. `evaluate.load("bleu")` computes the same
numbers, with code that it fetches from the hub.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from prefopt.errors import InputError
from prefopt.evaluation.scorers import AnyCritic, Scorer, Values, remember_readings
from prefopt.files import content_key
from prefopt.judges.critic import TYPED
from prefopt.judges.critic_cases import PairCase, Preference, ScoreCase, Templates
from prefopt.judges.questions import Case, Judge
from prefopt.judges.rubric import Rubric
from prefopt.loading import Lazy

PREFERENCE = "preference"  # the scorer that only the systems after the first have
EQUAL = {"": 0.5, "p": 0.5, "consistent": True}  # the preference between two equal answers
SHORT = 8  # words: up to here an answer is a name, a number or a phrase that can be matched as a whole

# Words in common with the reference


def reference_scorers(references: Sequence[str]) -> list[Scorer]:
    """Sentence BLEU and ROUGE-L; and the exact match, if all reference answers are short."""
    scorers = [bleu_scorer(), rouge_scorer()]
    if all(len(normalised(reference).split()) <= SHORT for reference in references):
        scorers.append(exact_scorer())
    return scorers


def bleu_scorer() -> Scorer:
    """Sentence BLEU of each answer, by the n-grams that are as long as the answer allows."""
    bleu = _library("sacrebleu").metrics.BLEU(effective_order=True)
    return Scorer(
        name="sentence_bleu",
        title="sentence BLEU",
        about=(
            "how many of an answer's word sequences are the reference's, 0 to 100. Unlike BLEU over all "
            "answers it has a value for each answer, by which systems are compared."
        ),
        score=lambda cases: [bleu.sentence_score(c.answer, [c.reference]).score for c in cases],
        needs_images=False,
    )


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU over all answers, 0..100, and sacrebleu's signature: what a publication states beside it."""
    bleu = _library("sacrebleu").metrics.BLEU()
    score = bleu.corpus_score(list(answers), [list(references)]).score
    return float(score), str(bleu.get_signature())


def rouge_scorer() -> Scorer:
    """ROUGE-L of each answer."""
    rouge = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return Scorer(
        name="rouge_l",
        title="ROUGE-L",
        about="how many words answer and reference share in the same order, as an F-measure, 0 to 100.",
        score=lambda cases: [100 * rouge.score(c.reference, c.answer)["rougeL"].fmeasure for c in cases],
        needs_images=False,
    )


def exact_scorer() -> Scorer:
    """Whether an answer is the reference, but for case, punctuation and white space."""
    return Scorer(
        name="exact",
        title="exact match",
        about="the share of answers that are the reference but for case, punctuation and white space.",
        score=lambda cases: [normalised(c.answer) == normalised(c.reference) for c in cases],
        kind="proportion",
        needs_images=False,
    )


def normalised(text: str) -> str:
    """The words of a text in lower case, without punctuation; of a number its sign and its point stay."""
    return " ".join(re.findall(r"(?<!\w)-?\d+(?:[.,]\d+)*\w*|[^\W_]+", text.casefold()))


class _Words:
    """The words that rouge_score finds in English, and those of other alphabets, which it drops."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f'BLEU and ROUGE-L need sacrebleu and rouge_score: pip install "prefopt[evaluate]" ({error})'
        ) from error


# Opinions


def grade_scorer(critic: Lazy[AnyCritic], name: str, *, with_reference: bool) -> Scorer:
    """A named critic's grade of each answer, 0..100; it sees the reference answer, or does not."""
    load = cache(critic.load)
    return Scorer(
        name="critic",
        title="critic score",
        about=(
            f"the grade that the vision-language model {name} gives the answer, 0 to 100, by image, question"
            f"{' and the reference answer' if with_reference else ''}. It is an opinion, and a model can "
            "learn to please it."
        ),
        score=lambda cases: load().score(_shown(cases, with_reference)),
        identity=content_key(f"{critic.identity} {with_reference}"),
        at_once=16,
        remember=lambda kept: remember_readings(load().readings, kept),
    )


def preference_scorer(critic: Lazy[AnyCritic], against: str, *, with_reference: bool) -> Scorer:
    """Whether a critic prefers an answer to the first system's: 1, 0, or a tie of 0.5; of PairCases.

    It is asked in both orders, and they have to agree, or it is a tie.
    """
    load = cache(critic.load)

    def compare(cases: Sequence[PairCase]) -> Mapping[str, Values]:
        found = load().compare(_shown(cases, with_reference))
        return {
            "": [None if one is None else _outcome(one) for one in found],
            "p": [None if one is None else one.p_first for one in found],
            "consistent": [None if one is None else one.consistent for one in found],
        }

    return Scorer(
        name=PREFERENCE,
        title="critic's preference",
        about=(
            f"how often a vision-language model prefers the answer to that of {against}, a tie as one half. "
            "It is asked in both orders, and where they disagree it is a tie."
        ),
        score=compare,
        kind="proportion",
        identity=content_key(f"{critic.identity} {with_reference}"),
        at_once=16,
        remember=lambda kept: remember_readings(load().readings, kept, replies=2),
    )


def rubric_scorer(judge: Lazy[Judge], rubric: Rubric, *, with_reference: bool) -> Scorer:
    """A judge's answers to a rubric's questions about each answer: points, and whether each is a good one.

    Good is a yes to a positive question and a no to a negative one; None is an unclear answer.
    """
    load, words = cache(judge.load), Templates.load(TYPED)
    if rubric.checks or rubric.needs_class:
        raise InputError(
            f"the rubric {rubric.name} asks about images of a class, or asks a detector; name one about "
            "answers, such as `answers`"
        )
    good = {item.name: ("yes" if item.sign > 0 else "no") for item in rubric.items}
    parts = {name: name if wanted == "yes" else f"no {name}" for name, wanted in good.items()}

    def ask(cases: Sequence[ScoreCase]) -> Mapping[str, Values]:
        shown = _shown(cases, with_reference)
        asked = [Case(c.images[0], words.words(c), rubric.questions("", c.question)) for c in shown]
        verdicts = [
            {question.name: answer.verdict for question, answer in zip(case.questions, answers, strict=True)}
            for case, answers in zip(asked, load().answer(asked), strict=True)
        ]
        points: Values = [sum(rubric.points(said).values()) for said in verdicts]
        shares = {
            parts[name]: [None if said[name] is None else said[name] == wanted for said in verdicts]
            for name, wanted in good.items()
        }
        return {"points": points, **shares}

    form = [[item.name, item.text, item.polarity, item.weight, item.needs] for item in rubric.items]
    return Scorer(
        name="rubric",
        title="rubric points",
        about=(
            f"a judge's answers to the yes/no questions of the rubric {rubric.name}: "
            f"{', '.join(parts.values())}. Each that is good gives the points of its weight, a bad one takes "
            "as many."
        ),
        score=ask,
        main="points",
        kinds=dict.fromkeys(parts.values(), "proportion"),
        identity=content_key(json.dumps([judge.identity, form, dict(words.texts), with_reference])),
        at_once=16,
    )


def _shown(cases: Sequence[Any], with_reference: bool) -> Sequence[Any]:
    return cases if with_reference else [replace(case, reference=None) for case in cases]


def _outcome(preference: Preference) -> float:
    """1 for a win of the first answer, 0 for a loss, 0.5 for a tie."""
    p = preference.p_first if preference.consistent else 0.5
    return 1.0 if p > 0.5 else 0.0 if p < 0.5 else 0.5
