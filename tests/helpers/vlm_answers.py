"""Answers of tiny vision-language models compared: models, questions, a scripted critic, a judge of yes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_vlm import picture, tiny_judge

from prefopt.config import LoraArguments
from prefopt.evaluation import answer_scorers
from prefopt.evaluation.answering import read_questions
from prefopt.evaluation.asked import Questions
from prefopt.evaluation.scorers import Scorer
from prefopt.evaluation.systems import VlmSystem
from prefopt.evaluation.vision_language import compare
from prefopt.judges.critic import TextCritic
from prefopt.judges.critic_cases import Templates
from prefopt.judges.questions import Answer, Case
from prefopt.judges.rubric import Rubric
from prefopt.judges.writers import Reply
from prefopt.loading import Lazy
from prefopt.vlm.models import add_lora, load_vlm

REFERENCES = ("It is a red elephant.", "a zebra", "a giraffe <script>alert(1)</script> from afar | yes")
TOKENS = 10
MARK = "\N{SECTION SIGN}"  # before each answer in a message to the critic


def write_models(folder: Path) -> Path:
    """A tiny model, two random adapters on it, another model, and 24 questions about 12 images."""
    base = tiny_judge(folder / "base")
    tiny_judge(folder / "other", seed=1)
    for seed in range(2):
        torch.manual_seed(seed)
        policy = add_lora(load_vlm(base)[0], LoraArguments(lora_r=4, lora_alpha=8))
        for name, value in policy.named_parameters():
            if "lora_" in name:
                value.data = 0.15 * torch.randn(value.shape)
        policy.save_pretrained(str(folder / f"lora{seed}"))
    write_table(folder / "data", [[picture(i // 2)] for i in range(24)])
    return folder


def write_words(folder: Path) -> Templates:
    """Templates that mark each answer."""
    (folder / "score_with_reference.txt").write_text(f"{{question}} {{reference}} {MARK}{{answer}}")
    marked = f"{{question}} {{reference}} {MARK}{{first}} {MARK}{{second}}"
    (folder / "compare_with_reference.txt").write_text(marked)
    return Templates.load(folder)


def write_table(folder: Path, images: Sequence[list]) -> None:
    """A split `test` of one question a row; the answers have different lengths."""
    rows = [
        {
            "images": shown,
            "prompt": [{"role": "user", "content": f"What is it, number {i}?"}],
            "completion": [{"role": "assistant", "content": REFERENCES[i % 3]}],
        }
        for i, shown in enumerate(images)
    ]
    said = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(Image()), prompt=said, completion=said)
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "test.parquet"))


@dataclass
class Scripted:
    """A critic that counts letters. Long answers are good; one of a length that 5 divides it cannot grade.

    Of two answers it prefers the longer one, and the first where they differ by one letter or none; where the
    second is longer by two, it is a tie.
    """

    identity: str = "counts letters"
    name: str = "scripted"
    max_new_tokens: int = 9
    asked: list[str] = field(default_factory=list)

    def write(self, messages) -> list[Reply]:
        self.asked += [message.text for message in messages]
        return [Reply(self._say(message.text), True) for message in messages]

    def _say(self, text: str) -> str:
        parts = [len(part.strip()) for part in text.split(MARK)[1:]]
        if len(parts) == 1:
            return "none" if parts[0] % 5 == 0 else f"Score: {7 * parts[0] % 101}"
        if parts[1] == parts[0] + 2:
            return "Verdict: tie"
        return "Verdict: second" if parts[1] > parts[0] + 1 else "Verdict: first"


@dataclass
class Yes:
    """A judge that says yes, but to nothing about refusals."""

    identity: str = "yes"
    cases: list[Case] = field(default_factory=list)

    def answer(self, cases) -> list[list[Answer]]:
        self.cases += cases
        return [[self._one(question.name) for question in case.questions] for case in cases]

    def _one(self, name: str) -> Answer:
        p = 0.1 if name == "refusal" else 0.9
        return Answer({"yes": p, "no": 1 - p}, other_mass=0.9 if name == "helpfulness" else 0.0)


def critic(writer: Scripted, words: Templates) -> Lazy:
    return Lazy(f"critic {writer.identity}", lambda: TextCritic(writer, words))


def systems(models: Path, *loras: int) -> dict[str, VlmSystem]:
    base = VlmSystem(str(models / "base"))
    return {"base": base} | {f"lora{n}": VlmSystem(base.model, str(models / f"lora{n}")) for n in loras}


def scorers(questions: Questions, lazy: Lazy) -> list[Scorer]:
    return [
        *answer_scorers.reference_scorers([one.reference for one in questions.asked]),
        answer_scorers.grade_scorer(lazy, "scripted", with_reference=True),
        answer_scorers.rubric_scorer(Lazy("yes", Yes), Rubric.load("answers"), with_reference=True),
    ]


def questions_of(models: Path) -> Questions:
    return read_questions(str(models / "data"), systems(models)["base"])


def run(models: Path, folder: Path, lazy: Lazy, *loras: int) -> dict:
    questions = questions_of(models)
    preference = answer_scorers.preference_scorer(lazy, "base", with_reference=True)
    return compare(
        systems(models, *loras),
        questions,
        scorers(questions, lazy),
        folder,
        preference=preference,
        max_new_tokens=TOKENS,
        device="cpu",
    )


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def column(rows: list[dict], system: str, metric: str) -> np.ndarray:
    return np.array([row["scores"][metric] for row in rows if row["system"] == system], dtype=float)
