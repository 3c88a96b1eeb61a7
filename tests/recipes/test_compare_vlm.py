"""`compare_vlm.py` as a user runs it: by path, with a critic behind a server, on two processes, refused."""

import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from launching import launch
from running import recipe
from servers import Scripted, chat
from tiny_vlm import PEFT_ON_TRANSFORMERS_5
from vlm_answers import read_rows, write_models

from prefopt import pocket
from prefopt.errors import InputError

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

RECIPE = "recipes/compare_vlm.py"
WRITTEN = ("summary.json", "results.jsonl", "table.md", "report.html")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that every run here shares: a tiny model, two adapters, 24 questions."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    return {
        "model_name_or_path": str(folder / "base"),
        "systems": ["base", f"sft={folder / 'lora0'}", f"dpo={folder / 'lora1'}"],
        "dataset_name": str(folder / "data"),
        "max_new_tokens": 6,
    }


def said(body: dict) -> dict:
    """What a scripted critic writes: a grade by the answer's length; and it prefers the longer answer."""
    text = body["messages"][0]["content"][-1]["text"]
    assert "A correct answer, for comparison:" in text, "by default it sees the reference"
    if "The answer to grade:" in text:
        answer = text.split("The answer to grade:")[1].split("Check what")[0].strip()
        return chat(f"Reasons.\nScore: {3 * len(answer) % 101}")
    first, rest = text.split("The first answer:")[1].split("The second answer:")
    second = rest.split("Check what")[0]
    return chat(f"Verdict: {'first' if len(first.strip()) > len(second.strip()) else 'second'}")


def test_by_path_with_a_critic_that_is_asked_once(setting: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Scripted({"/v1/chat/completions": lambda body, _: said(body)}) as server:
        asked = {"critic": "my-critic", "critic_url": server.url}
        launched = launch(
            RECIPE, setting | asked | {"output_dir": run, "pairwise": None}, tmp_path / "output"
        )
        assert launched.wait(300) == 0, launched.text()
        calls = len(server.calls)
        before = {name: (run / name).read_bytes() for name in WRITTEN}
        module = recipe("compare_vlm")
        module.main(module.CompareVlmConfig(**setting, **asked, pairwise=True, output_dir=str(run)))
        assert len(server.calls) == calls > 24
    assert {name: (run / name).read_bytes() for name in WRITTEN} == before
    rows, summary = read_rows(run), json.loads((run / "summary.json").read_text())
    assert len(rows) == 3 * 24
    assert all(row["scores"]["critic"] == 3 * len(row["answer"]) % 101 for row in rows)
    mean = sum(row["scores"]["critic"] for row in rows if row["system"] == "dpo") / 24
    assert summary["systems"]["dpo"]["means"]["critic"] == pytest.approx(mean)
    assert "24 rows, 24 questions" in launched.text() and "test loss" in launched.text()
    table = (run / "table.md").read_text()
    assert "24 questions about 12 images" in table
    assert f"| {summary['systems']['sft']['means']['loss']:.3f} |" in table


def become(rank: int, port: int) -> None:
    """What torchrun tells one of two processes; forks import nothing twice."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def test_two_processes_give_what_one_gives(setting: dict, tmp_path: Path) -> None:
    module = recipe("compare_vlm")
    module.main(module.CompareVlmConfig(**setting, output_dir=str(tmp_path / "one")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = setting | {"output_dir": tmp_path / "two", "batch_size": 5}
    both = [launch(RECIPE, options, tmp_path / f"{rank}", partial(become, rank, port)) for rank in (0, 1)]
    for launched in both:
        assert launched.wait(300) == 0, launched.text()
    shared = [(tmp_path / "two" / f"answers-0000{rank}.sqlite").stat().st_size for rank in (0, 1)]
    assert min(shared) > 10_000, "both took part"
    for one, other in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert (one["system"], one["row"], one["answer"]) == (other["system"], other["row"], other["answer"])
        assert other["log_p"] == pytest.approx(one["log_p"], abs=1e-4)


def test_a_typed_critic_whose_mind_is_elsewhere_is_told(setting: dict, tmp_path: Path) -> None:
    """The random model as its own critic: its probability lies on other words than the options."""
    module = recipe("compare_vlm")
    options = setting | {"critic": setting["model_name_or_path"], "critic_typed": True, "max_rows": 4}
    with pytest.raises(InputError, match=r"none of the 12 replies of the judge .* could be read"):
        module.main(module.CompareVlmConfig(**options, rubric="answers", output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"systems": ["base"]}, "needs 2 systems or more, not 1"),
        ({"systems": ["base", "base"]}, "'base' is named twice among the systems"),
        ({"systems": ["base", "x=./nowhere"]}, "--systems: there is no ./nowhere here"),
        ({"systems": ["base", "=x"]}, "has no name"),
        ({"model_name_or_path": "./nowhere"}, "there is no ./nowhere"),
        ({"dataset_name": None}, "--dataset_name is missing: only the model `pocket` has a default for it"),
        ({"dataset_test_split": "validation"}, "validation"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"tie": -1.0}, "--tie is -1"),
        ({"pairwise": True}, "--pairwise and --rubric ask the critic"),
        ({"rubric": "answers"}, "--pairwise and --rubric ask the critic"),
        ({"critic": "x", "critic_url": "y", "rubric": "nowhere"}, "there is no rubric 'nowhere'"),
        ({"critic": "./nowhere"}, "--critic: there is no ./nowhere"),
        ({"critic_url": "http://127.0.0.1:9"}, "name the --critic, too"),
        ({"critic": "x", "critic_url": "y", "critic_templates": "."}, "is no template of a critic"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(setting: dict, options: dict, message: str, tmp_path: Path) -> None:
    module = recipe("compare_vlm")
    with pytest.raises(InputError, match=message):
        module.main(module.CompareVlmConfig(**{**setting, "output_dir": str(tmp_path), **options}))


def test_pocket_is_a_model_and_questions() -> None:
    options: dict[str, Any] = {"systems": ["base", "again"], "critic": "pocket"}
    module = recipe("compare_vlm")
    config = module.CompareVlmConfig(**options, critic_typed=True)
    assert config.dataset_name == config.model_name_or_path == "pocket"
    assert config.critic_name == str(pocket.folder("critic"))
    with pytest.raises(InputError, match="does not write: add --critic_typed"):
        module.CompareVlmConfig(**options).lazy_critic("cpu", "text")
    config.critic_url = "http://127.0.0.1:9"
    assert config.critic_name == "pocket", "a server has names of its own"


def test_a_run_that_trained_all_weights_keeps_its_model_one_folder_below(
    setting: dict, tmp_path: Path
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        (folder / "config.json").write_text("{}")
    module = recipe("compare_vlm")
    with pytest.raises(InputError, match=r"holds neither an adapter nor a model; name .*run/model"):
        module.CompareVlmConfig(**{**setting, "systems": ["base", f"full={tmp_path / 'run'}"]})
