"""Vision-language models on the same questions: answers, losses, scores, and every pair of models compared.

Everything is kept by content. An answer's key holds the weights, the adapter, the question and its images; a
score's key holds the question, the answer, the reference and the scorer's identity. A rerun, after a crash or
with one more system, generates and scores only what is new. With several processes each takes its share of
the questions; they must share the folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from PIL import Image

from prefopt.errors import InputError
from prefopt.evaluation.answer_scorers import EQUAL, PREFERENCE
from prefopt.evaluation.answer_summary import LOSS, summarise_answers
from prefopt.evaluation.answering import Answered, Answering, weights_of
from prefopt.evaluation.asked import Asked, Questions
from prefopt.evaluation.scorers import Scorer
from prefopt.evaluation.scoring import Scores, kept_scores, processes, write_results
from prefopt.evaluation.systems import VlmSystem, check_each_once
from prefopt.files import content_key
from prefopt.judges.critic_cases import PairCase, ScoreCase
from prefopt.ledger import Ledger


class _Output(NamedTuple):
    """An answer to be scored, or to be compared with another one."""

    asked: Asked
    answer: str
    other: str | None = None

    @property
    def key(self) -> str:
        asked = self.asked
        return content_key(json.dumps([asked.key, asked.question, asked.reference, self.answer, self.other]))

    def case(self, images: Sequence[Image.Image]) -> ScoreCase | PairCase:
        question, reference = self.asked.question, self.asked.reference
        if self.other is None:
            return ScoreCase(images, question, self.answer, reference)
        return PairCase(images, question, self.answer, self.other, reference)


def compare(
    systems: Mapping[str, VlmSystem],
    questions: Questions,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    *,
    preference: Scorer | None = None,
    about: Mapping[str, str] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    tie: float = 0.01,
    device: str | torch.device | None = None,
) -> dict:
    """Answer and score every question with every system; write results.jsonl and summary.json.

    Answers are greedy. `scorers` read ScoreCases; `preference` reads PairCases of a further system's answer
    and the first one's; `about` are further facts for the summary, which is returned. InputError for fewer
    than two systems, and for questions that are all about one image, of which no interval could be told.
    """
    _check(systems, questions, scorers)
    state, folder = processes(), Path(output_dir)
    with state.split_between_processes(list(range(len(questions.asked)))) as mine:
        places = cast(list[int], mine)
        own = [questions.asked[place] for place in places]
        answering = Answering(
            questions,
            Ledger(folder, "answers", state.process_index),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            device=torch.device(device or state.device or "cpu"),
        )
        answered = answering.run(systems, own)
        ledger = Ledger(folder, "scores", state.process_index)
        parts = _score_all(questions, own, answered, scorers, preference, ledger)
        records = [
            {"row": place, **_record(questions, one, name, answered[name][n]), "parts": parts[name, n]}
            for name in systems
            for n, (place, one) in enumerate(zip(places, own, strict=True))
        ]
    order = {name: place for place, name in enumerate(systems)}
    gathered = sorted(gather_object(records), key=lambda row: (order[row["system"]], row["row"]))
    rows, metrics = _table(gathered, scorers, preference)
    described = {
        name: {"name": name, **asdict(system), "identity": weights_of(system)}
        for name, system in systems.items()
    }
    summary = summarise_answers(
        rows, described, metrics, {**(about or {}), "max_new_tokens": max_new_tokens}, tie
    )
    write_results(folder, rows, summary)
    return summary


def _check(systems: Mapping[str, VlmSystem], questions: Questions, scorers: Sequence[Scorer]) -> None:
    check_each_once("systems", list(systems), least=2)
    check_each_once("scorers", [scorer.name for scorer in scorers])
    groups = {one.group for one in questions.asked}
    if len(groups) < 2:
        raise InputError(
            f"{questions.examples.source}: its {len(questions.asked)} questions are all about one image, and "
            "an interval needs two images or more; give more of them"
        )


def _score_all(
    questions: Questions,
    asked: Sequence[Asked],
    answered: Mapping[str, Sequence[Answered]],
    scorers: Sequence[Scorer],
    preference: Scorer | None,
    ledger: Ledger,
) -> dict[tuple[str, int], dict[str, Scores]]:
    """What the scorers say of each system's answer to each question, by the scorer's name."""
    first, *others = answered
    outputs = {
        (name, n): _Output(one, answered[name][n].text) for name in answered for n, one in enumerate(asked)
    }
    parts: dict[tuple[str, int], dict[str, Scores]] = {place: {} for place in outputs}
    for scorer in scorers:
        for place, scores in _scores(scorer, outputs, questions, ledger).items():
            parts[place][scorer.name] = scores
    if preference:
        beside = {
            (name, n): outputs[name, n]._replace(other=answered[first][n].text)
            for name in others
            for n in range(len(asked))
        }
        differing = {place: output for place, output in beside.items() if output.answer != output.other}
        found = _scores(preference, differing, questions, ledger)
        for place in beside:
            parts[place][preference.name] = found.get(place, EQUAL)
    return parts


def _scores(
    scorer: Scorer, outputs: Mapping[tuple[str, int], _Output], questions: Questions, ledger: Ledger
) -> dict[tuple[str, int], Scores]:
    """A scorer's scores of outputs; equal ones are scored once."""
    by_key = {output.key: output for output in outputs.values()}

    def cases(keys: Sequence[str]) -> tuple[list[ScoreCase | PairCase]]:
        shown = [by_key[key] for key in keys]
        return ([o.case(questions.images(o.asked) if scorer.needs_images else ()) for o in shown],)

    found = kept_scores(scorer, list(by_key), cases, ledger)
    return {place: found[output.key] for place, output in outputs.items()}


def _record(questions: Questions, asked: Asked, system: str, answered: Answered) -> dict[str, Any]:
    """A line of results.jsonl but for the scores."""
    return {
        "system": system,
        "example": asked.index,
        "where": asked.where,
        "group": asked.group,
        "question": asked.question,
        "reference": asked.reference,
        "answer": answered.text,
        "tokens": answered.tokens,
        "finished": answered.finished,
        "log_p": answered.log_p,
        "reference_tokens": answered.reference_tokens,
    }


def _table(
    records: Sequence[Mapping], scorers: Sequence[Scorer], preference: Scorer | None
) -> tuple[list[dict], dict[str, dict[str, Any]]]:
    """The rows with their scores by metric, and what the metrics are."""
    metrics = dict(LOSS)
    for scorer in scorers:
        metrics |= scorer.describe(list(records[0]["parts"][scorer.name]))
    metrics |= preference.describe([""]) if preference else {}
    rows = []
    for record in records:
        row = {name: value for name, value in record.items() if name != "parts"}
        scores: dict[str, Any] = {"loss": -record["log_p"] / record["reference_tokens"]}
        for scorer in scorers:
            scores |= {scorer.metric(part): v for part, v in record["parts"][scorer.name].items()}
        if PREFERENCE in record["parts"]:
            said = record["parts"][PREFERENCE]
            scores[PREFERENCE] = said[""]
            row |= {"p_preferred": said["p"], "consistent": said["consistent"]}
        rows.append({**row, "scores": scores})
    return rows, metrics
