"""Trains the pocket's critic: its LLaVA, which learns to grade and to compare answers about pictures.

Tower frozen, the rest trained. It learns to answer the questions, too: who grades has to know. Its pictures
are of duos of the split `critic`, which no answering model is trained or tested on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from prefopt.judges.critic import BETTER, QUALITY, TYPED
from prefopt.judges.critic_cases import PairCase, ScoreCase, Templates
from prefopt.judges.questions import Question
from prefopt.judges.rubric import Rubric
from prefopt.pocket import folder
from prefopt.pocket.questions import KINDS, Asked, Duo, duos, render_duo
from pretraining.common import Run, Training, to_tensor
from pretraining.critic_answers import Graded, draw_answer, one_off, right_answer
from pretraining.llava import Doubts, loss_of, read
from pretraining.llava_rows import Row, collate
from pretraining.llava_text import Words

PREDICATES = (
    Question("right", "Is the answer right?"),
    Question("correctness", "Is the answer correct?"),
    *Rubric.load("answers").questions("", ""),
)
LETTERS = "ABCDE"
_PREDICATES = 2  # of each graded answer
_WITH_REFERENCE, _TIES, _EASY = 0.3, 0.1, 0.5
_ANSWERS_WEIGHT, _CHOICE_WEIGHT = 0.3, 3.0
_CHUNK = 100


AnyCase = ScoreCase | PairCase


class Lesson(NamedTuple):
    """What a step's rows hold of each picture, beside the picture."""

    asked: int  # questions about it
    graded: int = 0  # answers
    compared: int = 0  # pairs of answers, each in both orders


# Of which steps take turns. Answering costs little, and who grades has to know.
_COMPARE, _REHEARSE = Lesson(asked=0, compared=1), Lesson(asked=2, graded=1)
LESSONS = {
    "asking": (Lesson(asked=10),),
    "grading": (Lesson(asked=3, graded=2, compared=1),),
    "comparing": (_COMPARE, _COMPARE, _COMPARE, _REHEARSE),
}


class DuoPictures(NamedTuple):
    """Duos as the tower sees their pictures."""

    duos: list[Duo]
    seen: Tensor  # (n, tokens, width) float16, what the projector reads


@torch.no_grad()
def make_duo_pictures(seed: int, size: int, model: Any) -> DuoPictures:
    """`size` pictures (a multiple of 100) of duos of the split `critic`, as the model's tower sees them."""
    rng, pool = np.random.default_rng([seed, 2**31]), duos("critic")
    shown, seen = [], []
    layer = model.config.vision_feature_layer
    for _ in range(0, size, _CHUNK):
        chunk = [pool[i] for i in rng.integers(len(pool), size=_CHUNK)]
        pixels = to_tensor([render_duo(duo, int(rng.integers(2**31))) for duo in chunk])
        seen.append(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer].half())
        shown += chunk
    return DuoPictures(shown, torch.cat(seen))


class Prompts:
    """The tokens that a critic shows its judge of a case, and an answering model of a question."""

    def __init__(self, words: Words):
        self.words = words
        self.templates = Templates.load(TYPED)

    def question(self, text: str) -> list[int]:
        """A question about the picture itself."""
        return self.words.text(f"{text}<|assistant|>")

    def described(self, case: AnyCase, *graded: Graded) -> tuple[list[int], list[int]]:
        """What stands between the picture and a typed question, with its answers graded, one by one.

        Tokens, and of each: 1 or 0 if it ends a true or false word of an answer, else -1.
        """
        fields = ("answer",) if isinstance(case, ScoreCase) else ("first", "second")
        ends: dict[int, int] = {}
        for field, answer in zip(fields, graded, strict=False):
            start = self._text(replace(case, **{field: "\0"})).index("\0")
            ends |= {start + end: int(true) for end, true in answer.words}
        made = self.words.tokenizer(self._text(case), add_special_tokens=False, return_offsets_mapping=True)
        return made.input_ids, [ends.get(end, -1) for _, end in made.offset_mapping]

    def _text(self, case: AnyCase) -> str:
        return f"\nDescription: {self.templates.words(case)}\n\n"


def all_asked(duo: Duo) -> list[Asked]:
    """Every question about a duo's pictures; the seed is left open."""
    groups = duo, Duo(duo.other, duo.one)
    return [Asked(duo, -1, kind, *make(*both)) for kind, make in KINDS.items() for both in groups]


def make_row(rng: np.random.Generator, duo: Duo, lesson: Lesson, prompts: Prompts) -> Row:
    """A picture, questions about it, and answers that typed questions grade and compare."""
    words, row, questions = prompts.words, Row(), all_asked(duo)
    row.grow(-1, words.picture)
    for place in rng.permutation(len(questions))[: lesson.asked]:
        one = questions[place]
        row.grow(0, prompts.question(one.question), words.answer(one.answer), _ANSWERS_WEIGHT)
    for _ in range(lesson.graded):
        _grade(rng, row, questions[rng.integers(len(questions))], prompts)
    for _ in range(lesson.compared):
        _compare(rng, row, questions[rng.integers(len(questions))], prompts)
    return row


def _grade(rng: np.random.Generator, row: Row, asked: Asked, prompts: Prompts) -> None:
    graded, words = draw_answer(rng, asked), prompts.words
    case = ScoreCase([], asked.question, graded.text, _reference(rng, asked))
    branch = _grow(row, prompts.described(case, graded))
    known = [question for question in PREDICATES if question.name in graded.truths]
    for place in rng.permutation(len(known))[:_PREDICATES]:
        answer = "Yes" if graded.truths[known[place].name] else "No"
        row.grow(branch, words.question(known[place]), words.answer(answer))
    if rng.random() < 0.5:
        row.grow(branch, words.question(QUALITY), words.answer(LETTERS[graded.level]))


def _compare(rng: np.random.Generator, row: Row, asked: Asked, prompts: Prompts) -> None:
    """A pair in both orders, so that the place of an answer tells nothing."""
    pair, words, reference = _pair(rng, asked), prompts.words, _reference(rng, asked)
    for first, second in (pair, pair[::-1]):
        case = PairCase([], asked.question, first.text, second.text, reference)
        tie = first.level == second.level
        better = rng.random() < 0.5 if tie else first.level > second.level
        branch = _grow(row, prompts.described(case, first, second))
        row.grow(branch, words.question(BETTER), words.answer("A" if better else "B"), _CHOICE_WEIGHT)


def _grow(row: Row, marked: tuple[list[int], list[int]]) -> int:
    """A branch after the picture whose tokens are marked as true or false."""
    before, (tokens, truth) = len(row.tokens), marked
    branch = row.grow(0, tokens)
    row.truth[before : before + len(truth)] = truth
    return branch


def _pair(rng: np.random.Generator, asked: Asked) -> tuple[Graded, Graded]:
    """Two different answers; half of the time the right one and one with one wrong fact."""
    if rng.random() < _EASY:
        return right_answer(rng, asked), one_off(rng, asked)
    tie = rng.random() < _TIES
    while True:
        one, other = draw_answer(rng, asked), draw_answer(rng, asked)
        if one.text != other.text and (one.level == other.level) == tie:
            return one, other


def _reference(rng: np.random.Generator, asked: Asked) -> str | None:
    return asked.answer if rng.random() < _WITH_REFERENCE else None


def train(runs: Mapping[str, Run], size: int) -> tuple[LlavaForConditionalGeneration, Any]:
    """The critic with averaged weights, in float32, and its processor.

    `runs` are trainings by the names of LESSONS, one after another; each draws `size` pictures of its own.
    """
    processor: Any = AutoProcessor.from_pretrained(folder("llava"))
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder("llava"))
    model.model.vision_tower.requires_grad_(False)
    prompts = Prompts(Words(processor))
    torch.manual_seed(next(iter(runs.values())).seed)
    modules = torch.nn.ModuleDict({"llava": model, "doubts": Doubts(model.config.text_config.hidden_size)})
    for name, run in runs.items():
        training = Training(run, modules)
        if training.step < run.steps:
            _train_on(training, LESSONS[name], make_duo_pictures(run.seed, size, model), prompts)
        training.finished().train()
    return model.eval(), processor


def _train_on(training: Training, lessons: Sequence[Lesson], pictures: DuoPictures, prompts: Prompts) -> None:
    """The steps that remain of one training; the lessons take turns."""
    model: Any = training.modules["llava"]
    for rng in training.batches():
        items = rng.integers(len(pictures.duos), size=training.run.batch)
        lesson = lessons[training.step % len(lessons)]
        rows = [make_row(rng, pictures.duos[i], lesson, prompts) for i in items]
        batch = collate(rows, prompts.words.tokenizer.pad_token_id)
        features = model.model.multi_modal_projector(pictures.seen[torch.from_numpy(items)].float())
        layers = read(model, batch, features)
        losses = {"answering": loss_of(model, batch, layers)}
        if (batch.truth >= 0).any():
            losses["doubting"] = training.modules["doubts"](layers, batch.truth)
        values = {name: value.item() for name, value in losses.items()}
        training.update(torch.stack(list(losses.values())).sum(), **values)
