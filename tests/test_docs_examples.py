"""The examples of docs/: tables, rubrics and votes are read, code runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import DOCS, fenced
from pictures import png
from PIL import Image
from running import recipe

from data_builders.engine.stages import Group
from data_builders.export.tables import EXPORTS
from prefopt.diffusion import formats
from prefopt.diffusion.families import FAMILIES
from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.evaluation.votes import read_votes
from prefopt.judges.questions import Case, Question
from prefopt.judges.rubric import Rubric
from prefopt.objectives import OBJECTIVES, Scored, make_objective
from prefopt.vlm import formats as vlm_formats
from prefopt.vlm.examples import read_vision_examples

# Examples of data

EXAMPLES = re.findall(
    r"<!-- read as: (.+?) -->\n```(?:json|csv)\n(.*?)```", (DOCS / "data-formats.md").read_text("utf-8"), re.S
)


def written(told: str, text: str, folder: Path) -> tuple[str, str, list[str]]:
    """An example as a file with its pictures: what it is read as, the path to read, its columns."""
    kind, _, file = told.partition(", in ")
    path = folder / (file or "table.jsonl")
    for seed, name in enumerate(sorted(set(re.findall(r"\w+\.png", text)))):
        (folder / name).write_bytes(png(seed))
    path.write_text(text, encoding="utf-8")
    first = text.splitlines()[0]
    columns = first.split(",") if path.suffix == ".csv" else list(json.loads(first))
    return kind, str(folder if path.name == "metadata.jsonl" else path), columns


@pytest.mark.parametrize(("told", "text"), EXAMPLES)
def test_an_example_of_a_table_is_read(told, text, tmp_path):
    kind, path, columns = written(told, text, tmp_path)
    examples = 1 if "prompt_id" in columns else 2
    if kind == "images":
        table = read_preferences(path)
        assert len(table) == examples and not table.dropped
        assert all(ranks[0] == 1 and max(ranks) > 1 for ranks in table.column("ranks"))
        assert len(read_sft(path)) == examples, "of which the best can be imitated"
    elif kind == "images to imitate":
        assert [len(names) for names in read_sft(path).column("columns")] == [1, 1]
    else:
        pairs = kind == "pairs of answers"
        read = read_vision_examples(path, "pairs" if pairs else "sft")
        assert len(read) == examples and not read.dropped
        for index in range(examples):
            example = read[index, 0]
            assert len(example["images"]) == 1 and len(example["completions"]) == 1 + pairs
            assert example["prompt"][-1]["role"] == "user"
            assert sum(block["type"] == "image" for block in example["prompt"][-1]["content"]) == 1


def test_every_format_has_an_example():
    images, answers = [], []
    for told, text in EXAMPLES:
        first = text.splitlines()[0]
        columns = first.split(",") if "csv" in told else list(json.loads(first))
        (images if told.startswith("images") else answers).append(set(columns))
    for form in formats.FORMATS:
        # Of two names for a column one is shown.
        near = {form.columns, tuple(name.replace("image_path", "file_path") for name in form.columns)}
        near.add(tuple("image_path" if name == "image" else name for name in form.columns))
        assert any(columns.issuperset(one) for columns in images for one in near), form.columns
    for form in vlm_formats.FORMATS:
        near = {form.columns, tuple(name.replace("messages", "conversations") for name in form.columns)}
        assert any(columns.issuperset(one) for columns in answers for one in near), form.columns


def test_the_examples_of_a_rubric_and_of_votes_are_read(tmp_path):
    (text,) = fenced(DOCS / "building-data.md", "yaml")
    (tmp_path / "questions.yaml").write_text(text, encoding="utf-8")
    rubric = Rubric.load(str(tmp_path / "questions.yaml"))
    assert {item.name: item.weight for item in rubric.items} == {"there": 1, "mood": 2, "blurred": 1}
    verdicts = {"there": "yes", "mood": "yes", "blurred": "yes"}
    assert rubric.points(verdicts) == {"there": 1.0, "mood": 2.0, "blurred": -1.0}
    assert rubric.points({**verdicts, "there": "no"})["mood"] == 0
    (text,) = fenced(DOCS / "comparing.md", "json")
    (tmp_path / "votes.json").write_text(text, encoding="utf-8")
    (ballot,) = read_votes([tmp_path / "votes.json"])
    assert [vote.winner for vote in ballot.votes] == ["dpo"]


# Examples of code


def test_the_extensions_work(monkeypatch):
    added = ((OBJECTIVES, "exponential"), (OBJECTIVES, "likelihood_of_the_best"), (FAMILIES, "MyPipeline"))
    for registry, name in (*added, (EXPORTS, "worst")):
        monkeypatch.setitem(registry, name, None)  # so that it is taken out again
    mine: dict[str, Any] = {"__name__": "mine"}
    for text in fenced(DOCS / "extending.md", "python"):
        exec(compile(text, "extending.md", "exec"), mine)

    scores, ranks = torch.tensor([[2.0, 1.0], [0.0, 0.5]]), torch.tensor([[1, 2], [1, 2]])
    loss = make_objective("exponential", beta=2.0)(Scored(scores), torch.zeros(2, 2), {"ranks": ranks})
    assert loss.losses.tolist() == pytest.approx([math.exp(-2), math.exp(1)])
    assert recipe("diffusion_dpo").DiffusionDPOConfig(loss_type="exponential", use_cpu=True)
    best = make_objective("likelihood_of_the_best", beta=1.0)
    assert best(Scored(scores, nll=-scores), None, {"ranks": ranks}).losses.tolist() == [-2.0, 0.0]

    assert FAMILIES["MyPipeline"].prediction((torch.ones(1, 8, 2, 2),)).shape == (1, 4, 2, 2)
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    question = Question("dark", "Is it dark?")
    dark, light = mine["judge"].load().answer([Case(image, "", (question,)) for image in (black, white)])
    assert (dark[0].verdict, light[0].verdict) == ("yes", "no")
    assert mine["darkness"].score([black, white], ["", ""]) == [255, 0]
    rows = [{"rank": 1}, {"rank": 2}]
    assert list(EXPORTS["worst"].rows(Group(rows, rows, []))) == [{"rank": 2}]
