"""How good the pocket's LLaVA is: as a judge, at describing a picture, and at writing prompts."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Case, Judge
from prefopt.judges.shared_prefix import SharedPrefixJudge
from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, Scene, caption, is_held_out, parse
from pretraining.common import to_images
from pretraining.flaws import answers
from pretraining.llava_lessons import Request
from pretraining.llava_pictures import FlawedPictures
from pretraining.llava_questions import RUBRIC
from pretraining.llava_text import DESCRIBE

_ASKED_RIGHT = 0.5


class Exam(NamedTuple):
    """A case with the answers that are right; a question that does not count has none."""

    case: Case
    truths: dict[str, bool]


def make_exams(pictures: FlawedPictures, images: Sequence[Image.Image], seed: int) -> list[Exam]:
    """The rubric about each picture; half of the descriptions are right, the rest off in one attribute."""
    rng = np.random.default_rng(seed)
    exams = []
    for shown, flaw, image in zip(pictures.scenes, pictures.flaws, images, strict=True):
        asked = shown if rng.random() < _ASKED_RIGHT else _off(rng, shown)
        prompt = caption(asked, int(rng.integers(PHRASINGS)))
        case = Case(image, prompt, RUBRIC.questions(asked.animal, prompt))
        exams.append(Exam(case, answers(shown, flaw, asked)))
    return exams


def _off(rng: np.random.Generator, scene: Scene) -> Scene:
    name = str(rng.choice(list(ATTRIBUTES)))
    others = [value for value in ATTRIBUTES[name] if value != getattr(scene, name)]
    values = {n: getattr(scene, n) for n in ATTRIBUTES} | {name: others[rng.integers(len(others))]}
    return Scene(**values)


def judged(judge: Judge, exams: Sequence[Exam]) -> dict[str, dict[str, float]]:
    """By question and over all: the share of right answers, also apart where yes and where no is right.

    `always_yes` is what a judge would get that answers yes to everything. An unclear answer is wrong.
    """
    marks: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for exam, found in zip(exams, judge.answer([exam.case for exam in exams]), strict=True):
        for question, answer in zip(exam.case.questions, found, strict=True):
            if question.name in exam.truths:
                truth = exam.truths[question.name]
                marks[question.name].append((truth, answer.verdict == (YES if truth else NO)))
    marks["all"] = [mark for name in list(marks) for mark in marks[name]]
    return {name: _shares(marks[name]) for name in [*(item.name for item in RUBRIC.items), "all"]}


def _shares(marks: list[tuple[bool, bool]]) -> dict[str, float]:
    return {
        "right": float(np.mean([right for _, right in marks])),
        "right_of_yes": float(np.mean([right for truth, right in marks if truth])),
        "right_of_no": float(np.mean([right for truth, right in marks if not truth])),
        "always_yes": float(np.mean([truth for truth, _ in marks])),
    }


@torch.no_grad()
def described(model: Any, processor: Any, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> float:
    """The share of pictures whose greedy description is a caption of exactly their scene."""
    content = [{"type": "image"}, {"type": "text", "text": DESCRIBE}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[prompt] * len(images), images=list(images), return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([_scene(text) == scene for text, scene in zip(texts, scenes, strict=True)]))


@torch.no_grad()
def written(model: Any, processor: Any, request: Request, counts: Sequence[int]) -> dict[str, float]:
    """Lists of every animal and count, sampled at temperature 0.7 and top_p 0.95: of lists and of lines.

    `lists_complete` have as many lines as asked, no two alike; `lines_good` are captions of training scenes
    of the animal.
    """
    asked = [(animal, count) for animal in ATTRIBUTES["animal"] for count in counts]
    prompts = []
    for animal, count in asked:
        system, user = request.messages(count, animal)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        prompts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = processor.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    made = model.generate(**inputs, max_new_tokens=500, do_sample=True, temperature=0.7, top_p=0.95, top_k=0)
    texts = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    complete, good = [], []
    for (animal, count), text in zip(asked, texts, strict=True):
        lines = [line.partition(". ")[2] for line in text.splitlines()]
        scenes = [_scene(line) for line in lines]
        complete.append(len(lines) == count == len(set(lines)))
        good += [s is not None and s.animal == animal and not is_held_out(s) for s in scenes]
    return {"lists_complete": float(np.mean(complete)), "lines_good": float(np.mean(good))}


def measure(folder: Path, pictures: FlawedPictures, request: Request) -> dict[str, Any]:
    """All of the above on pictures that training never saw, the judge apart on renders and on VAE copies."""
    judge = SharedPrefixJudge(str(folder), batch_size=16)
    model, processor = judge.answerer.model, AutoProcessor.from_pretrained(folder)
    images = to_images(pictures.values(np.arange(len(pictures.scenes))))
    exams = make_exams(pictures, images, seed=1)
    of_copies = {
        name: judged(
            judge, [exam for exam, copy in zip(exams, pictures.copied, strict=True) if copy == copied]
        )
        for name, copied in (("renders", False), ("vae_copies", True))
    }
    sound = [i for i, flaw in enumerate(pictures.flaws) if flaw == "none"]
    return {
        "held_out_answers": judged(judge, exams),
        "of_which": {name: figures["all"] for name, figures in of_copies.items()},
        "held_out_described": described(
            model, processor, [images[i] for i in sound], [pictures.scenes[i] for i in sound]
        ),
        "lists": written(model, processor, request, counts=(5, 10, 20)),
        "measures": "answers to the questions that count; always_yes is a judge that says yes to everything",
    }


def show(quality: dict[str, Any]) -> None:
    """Print the judge's figures as a table, an always-yes judge's beside them."""
    print(f"{'question':20}{'right':>8}{'of yes':>8}{'of no':>8}{'always yes':>12}")
    for name, figures in quality["held_out_answers"].items():
        right, yes, no, always = figures.values()
        print(f"{name:20}{right:8.3f}{yes:8.3f}{no:8.3f}{always:12.3f}")


def _scene(text: str) -> Scene | None:
    try:
        return parse(text)
    except InputError:
        return None
