"""How good the pocket's critic is, on the questions of the test split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from prefopt.judges.critic import TYPED
from prefopt.judges.critic_cases import Critic, PairCase, ScoreCase, Templates
from prefopt.judges.loading import load_critic, load_judge
from prefopt.judges.questions import YES, Case, Judge
from prefopt.pocket.questions import ask, render_duo
from pretraining.critic import PREDICATES
from pretraining.critic_answers import one_off, wrong_facts


class Exam(NamedTuple):
    """A question about a picture with its right answer and one that has one wrong fact."""

    image: Image.Image
    question: str
    right: str
    wrong: str
    fact: str  # that is wrong


def make_exams(count: int) -> list[Exam]:
    """The first questions of the test split, each with a wrong answer that is drawn from its number."""
    exams = []
    for number in range(count):
        asked, rng = ask("test", number), np.random.default_rng([number, 7])
        image, wrong = render_duo(asked.duo, asked.seed), one_off(rng, asked).text
        (fact,) = wrong_facts(wrong, asked.answer)
        exams.append(Exam(image, asked.question, asked.answer, wrong, fact))
    return exams


def judged(judge: Judge, exams: Sequence[Exam]) -> dict[str, float]:
    """The share of right and of wrong answers that a yes or no recognises, and the mean of both."""
    words, question = Templates.load(TYPED), PREDICATES[0]
    shares = {}
    for side in ("right", "wrong"):
        cases = [ScoreCase([exam.image], exam.question, getattr(exam, side)) for exam in exams]
        given = judge.answer([Case(case.images[0], words.words(case), (question,)) for case in cases])
        shares[side] = float(np.mean([answer.verdict == YES for (answer,) in given]))
    sides = {"of_right": shares["right"], "of_wrong": 1 - shares["wrong"]}
    return {"balanced": float(np.mean(list(sides.values()))), **sides}


def graded(critic: Critic, exams: Sequence[Exam], *, with_reference: bool) -> dict[str, Any]:
    """Mean scores of right and wrong answers; how often the right one scores higher, and is preferred.

    `consistent` is the share of pairs whose two orders agree. A judgement that could not be read is NaN, and
    no success.
    """
    known = [exam.right if with_reference else None for exam in exams]

    def scores(side: str) -> np.ndarray:
        cases = zip(exams, known, strict=True)
        return np.array(
            critic.score([ScoreCase([e.image], e.question, getattr(e, side), r) for e, r in cases]), float
        )

    right, wrong = scores("right"), scores("wrong")
    # The right answer stands first in every other case.
    firsts = [bool(place % 2) for place in range(len(exams))]
    found = critic.compare(
        [
            PairCase([e.image], e.question, *((e.right, e.wrong) if first else (e.wrong, e.right)), r)
            for e, r, first in zip(exams, known, firsts, strict=True)
        ]
    )
    preferred = np.array(
        [p is not None and (p.p_first > 0.5) == first for p, first in zip(found, firsts, strict=True)]
    )
    facts = np.array([exam.fact for exam in exams])
    return {
        "mean_score_right": right.mean(),
        "mean_score_wrong": wrong.mean(),
        "higher_score_of_right": np.mean(right > wrong),
        "prefers_right": preferred.mean(),
        "prefers_right_where_wrong": {str(f): preferred[facts == f].mean() for f in np.unique(facts)},
        "consistent": np.mean([p is not None and p.consistent for p in found]),
    }


def measure(folder: Path, count: int = 200) -> dict[str, Any]:
    """All figures of the critic of a folder, without and with the right answer before its eyes."""
    exams, name = make_exams(count), str(folder)
    critic = load_critic(name, typed=True, batch_size=16)
    return {
        "is_it_right": judged(load_judge(name, batch_size=16), exams),
        "without_reference": graded(critic, exams, with_reference=False),
        "with_reference": graded(critic, exams, with_reference=True),
        "measures": "the right answer and one with one wrong fact to each of 200 test questions",
    }
