"""How a judge's questions are put to a server, and how its answers are read, in four dialects of HTTP.

- `systemone`: POST /v1/systemone, the typed questions of transformers serve, vLLM, SGLang and others.
- `decisions`: POST /v1/decisions, OpenAI's.
- `logprobs`: chat completions, one question each, by the log-probabilities of the first token.
- `text`: chat completions, one question each, by a strict reading of what is written.

In the last two the words are those of the first, so that all read the same prompt. Nothing here does I/O.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from string import ascii_uppercase
from typing import Any, Literal

from prefopt.endpoint import Unfit, chat_text
from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Answer, Question, system_one

Api = Literal["systemone", "decisions", "logprobs", "text"]

# What float32 can tell from 1: a larger certainty than this is rounding, or a text, which has none.
CERTAIN = 1e-7
LARGEST = 1e6  # of a probability, or of a weight that stands for one
TOP = 20  # log-probabilities asked for: as many as OpenAI and vLLM give
WRITTEN = 64  # tokens that a text may take: an answer and a few words before it
AROUND = " \t\r\n\u2581\u0120\u010a.,:;!*_-\"'`()[]"  # around a label inside a token or a clause


@dataclass(frozen=True)
class Request:
    """What is asked at once about one image, a PNG in base64."""

    png: str
    prompt: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Dialect:
    """A route, how many questions fit into one request, and both directions."""

    path: str
    most: int
    body: Callable[[str, Request], dict[str, Any]]  # of the model's name and what is asked
    read: Callable[[tuple[Question, ...], Mapping[str, Any]], list[Answer]]


def words(question: Question, prompt: str) -> str:
    """What stands behind the image: transformers' DECISION_PROMPT of the state `\\nDescription: {prompt}`."""
    labels, lines = _labels(question), [question.text]
    if question.type == "predicate":
        ask = f"Answer {labels[0]} or {labels[1]} only."
    else:
        lines += [f"{label}. {option}" for label, option in zip(labels, question.options, strict=True)]
        kind = "option" if question.type == "choice" else "level"
        ask = f"Answer with the letter of the {kind} that fits best ({labels[0]} to {labels[-1]}) only."
    return "\n".join([f"\nDescription: {prompt}\n", *filter(None, lines), ask])


def unreadable(question: Question) -> Answer:
    """An answer that says nothing: never a yes, never a no."""
    return Answer(dict.fromkeys(question.options, 1 / len(question.options)), other_mass=1.0)


def read_text(question: Question, text: str) -> Answer:
    """A written answer, read strictly.

    The text is cut into clauses at line ends and punctuation. Those that are an answer and nothing else
    (yes, no, a letter, an option's words) count, whatever stands around them, such as `1. Yes,` or a
    preamble; if there is none, or if two disagree, the text cannot be read.
    """
    meant = {option.casefold(): option for option in question.options}
    letters = (
        {} if question.type == "predicate" else dict(zip(_labels(question), question.options, strict=True))
    )
    clauses = (clause.strip(AROUND) for clause in re.split(r"[\n.,:;!()]|\s[-\u2013\u2014]|\u2014", text))
    found = {letters.get(clause) or meant.get(clause.casefold()) for clause in clauses} - {None}
    if len(found) != 1:
        return unreadable(question)
    return _shares(question, {option: float(option in found) for option in question.options})


def read_tokens(question: Question, listed: Sequence[tuple[str, float]]) -> Answer:
    """The first token's likeliest candidates as (text, log-probability): variants of a label are summed.

    An option that is not listed gets its upper bound: the smaller of the least listed probability and the
    probability that the list leaves.
    """
    by_label = dict(zip(map(str.casefold, _labels(question)), question.options, strict=True))
    mass = dict.fromkeys(question.options, 0.0)
    for token, logprob in listed:
        label = token.strip(AROUND)
        # A small `a` is an article more often than a letter.
        if label.casefold() in by_label and (question.type == "predicate" or label.isupper()):
            mass[by_label[label.casefold()]] += exp(logprob)
    found, seen = sum(mass.values()), [exp(logprob) for _, logprob in listed]
    if not found:
        return unreadable(question)
    unseen = max(0.0, min(min(seen), 1 - sum(seen)))
    answer = _shares(question, {option: p or unseen for option, p in mass.items()})
    return Answer(answer.probabilities, other_mass=min(1.0, max(0.0, 1 - found)))


def _systemone_body(model: str, request: Request) -> dict[str, Any]:
    image = {"type": "image", "format": "png", "data_base64": request.png}
    return {"model": model, **system_one(request.questions, request.prompt, image)}


def _systemone_read(questions: tuple[Question, ...], body: Mapping[str, Any]) -> list[Answer]:
    answers = []
    for question in questions:
        answer = _field(body, "answers", question.name)
        if question.type == "predicate":
            answers.append(_predicate(question, _field(answer, "noul")))
            continue
        given = _field(answer, "probabilities")
        names = question.options if question.type == "choice" else map(str, range(len(question.options)))
        values = {option: _field(given, name) for option, name in zip(question.options, names, strict=True)}
        answers.append(_shares(question, values))
    return answers


def _decisions_body(model: str, request: Request) -> dict[str, Any]:
    content = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{request.png}"},
        {"type": "input_text", "text": f"Description: {request.prompt}"},
    ]
    questions = []
    for question in request.questions:
        asked: dict[str, Any] = {"type": question.type, "name": question.name, "instructions": question.text}
        if question.type == "choice":
            asked["choices"] = [{"value": option} for option in question.options]
        elif question.type == "score":
            asked["levels"] = [{"label": option} for option in question.options]
        questions.append(asked)
    message = {"type": "message", "role": "user", "content": content}
    return {"model": model, "input": [message], "questions": questions}


def _decisions_read(questions: tuple[Question, ...], body: Mapping[str, Any]) -> list[Answer]:
    given = _field(body, "answers")
    if not isinstance(given, list) or len(given) != len(questions):
        raise Unfit(f"{len(questions)} questions were asked, and the answers are {given}")
    answers = []
    for question, answer in zip(questions, given, strict=True):
        if (kind := _field(answer, "type")) == "refusal":
            answers.append(unreadable(question))
            continue
        if kind != question.type or answer.get("name", question.name) not in (question.name, None):
            raise Unfit(f"the {question.type} {question.name} was answered {answer}")
        if kind == "predicate":
            answers.append(_predicate(question, _field(answer, "probability")))
            continue
        name = "value" if kind == "choice" else "label"
        listed = _field(answer, "probabilities")
        if not isinstance(listed, list):
            raise Unfit(f"the probabilities of {question.name} are no list, but {listed}")
        values = {str(_field(p, name)): _field(p, "probability") for p in listed}
        answers.append(_shares(question, {option: _field(values, option) for option in question.options}))
    return answers


def _chat_body(model: str, request: Request) -> dict[str, Any]:
    (question,) = request.questions
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{request.png}"}},
        {"type": "text", "text": words(question, request.prompt)},
    ]
    message = {"role": "user", "content": content}
    return {"model": model, "messages": [message], "temperature": 0.0, "max_tokens": WRITTEN}


def _logprobs_body(model: str, request: Request) -> dict[str, Any]:
    return _chat_body(model, request) | {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}


def _logprobs_read(questions: tuple[Question, ...], body: Mapping[str, Any]) -> list[Answer]:
    try:
        first = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        listed = [(str(token["token"]), float(token["logprob"])) for token in first]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise Unfit(f"it sends no log-probabilities, but {dict(body)}") from error
    if not listed or not all(logprob <= 1e-3 for _, logprob in listed):  # a NaN is no more than anything
        raise Unfit(f"its log-probabilities are {listed}")
    return [read_tokens(questions[0], listed)]


def _text_read(questions: tuple[Question, ...], body: Mapping[str, Any]) -> list[Answer]:
    return [read_text(questions[0], chat_text(body)[0])]


# In the order in which `auto` tries them.
DIALECTS: dict[Api, Dialect] = {
    "systemone": Dialect("/v1/systemone", 64, _systemone_body, _systemone_read),
    "decisions": Dialect("/v1/decisions", 400, _decisions_body, _decisions_read),
    "logprobs": Dialect("/v1/chat/completions", 1, _logprobs_body, _logprobs_read),
    "text": Dialect("/v1/chat/completions", 1, _chat_body, _text_read),
}


def _labels(question: Question) -> tuple[str, ...]:
    if question.type == "predicate":
        return ("Yes", "No")
    if len(question.options) > len(ascii_uppercase):
        raise InputError(f"{question.name} has {len(question.options)} options; a chat has letters for 26")
    return tuple(ascii_uppercase[: len(question.options)])


def _predicate(question: Question, yes: Any) -> Answer:
    if isinstance(yes, bool) or not isinstance(yes, int | float) or not 0 <= yes <= 1:
        raise Unfit(f"the probability of {question.name} is {yes!r}, which is no number in 0..1")
    return _shares(question, {YES: yes, NO: 1 - yes})


def _shares(question: Question, values: Mapping[str, Any]) -> Answer:
    """Numbers of at least 0 by option, as probabilities that are never quite 0 or 1."""
    for value in values.values():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= LARGEST:
            raise Unfit(f"the probabilities of {question.name} are {dict(values)}")
    whole = sum(values.values())
    if not whole:
        raise Unfit(f"the probabilities of {question.name} are all 0")
    floored = {option: max(value / whole, CERTAIN) for option, value in values.items()}
    return Answer({option: value / sum(floored.values()) for option, value in floored.items()})


def _field(body: Any, *names: str) -> Any:
    for name in names:
        if not isinstance(body, Mapping) or name not in body:
            raise Unfit(f"there is no {' / '.join(names)} in what it answered, {body}")
        body = body[name]
    return body
