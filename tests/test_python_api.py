"""prefopt as a library: its public names, its page of documentation, and a trainer around one's own model."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from launching import ROOT
from PIL import Image
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import prefopt
from prefopt import (
    Answer,
    InputError,
    Loss,
    Objective,
    PreferenceConfig,
    PreferenceTrainer,
    Question,
    Scored,
    VisitDataset,
    ask,
    frozen_copy,
    losses,
    make_objective,
)

PAGE = (ROOT / "docs" / "python-api.md").read_text()


# The names


def test_every_public_name_resolves_is_described_and_stands_on_the_page():
    listed = set(re.findall(r"`(\w+)`", PAGE.partition("## All names")[2]))
    assert set(prefopt.__all__) == listed - {"None"}
    for name in prefopt.__all__:
        assert getattr(prefopt, name).__doc__, name
    assert set(prefopt.__all__) <= set(dir(prefopt))
    assert {name for name in vars(losses) if name.endswith("_loss")} <= set(prefopt.__all__)


def test_editors_are_shown_the_same_names():
    source = Path(prefopt.__file__).read_text()
    assert {*re.findall(r" as (\w+)\n", source)} == set(prefopt.__all__)


def test_a_mistyped_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'prefopt' has no attribute 'dpo_los'"):
        prefopt.dpo_los  # noqa: B018


def test_importing_and_listing_load_no_torch():
    program = (
        "import sys, runpy, prefopt; dir(prefopt); prefopt.pocket.folder('llava'); prefopt.InputError; "
        "sys.argv[1:] = ['--help']; runpy.run_module('prefopt', run_name='__main__'); "
        "assert not {'torch', 'transformers', 'numpy', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The page


def test_what_the_page_shows_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") >= 4 and blocks[0][1]
    assert sum(bool(line.strip()) for line in blocks[0][0].splitlines()) <= 20
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for code, shown in blocks:
        exec(compile(code, "docs/python-api.md", "exec"), namespace)
        printed = iter(capsys.readouterr().out.splitlines())
        for line in shown.splitlines():
            assert line in printed, f"{line!r} was not printed, or not in this order"
    assert (tmp_path / "runs" / "mine" / "checkpoint-40" / "model.safetensors").is_file()


# Judges


class Judge:
    """Says yes where the text of the question has an even length, and remembers what it saw."""

    identity = "even"

    def answer(self, cases):
        self.cases = cases
        return [
            [Answer({"yes": 1.0 - len(q.text) % 2, "no": 0.0 + len(q.text) % 2}) for q in case.questions]
            for case in cases
        ]


def test_a_judge_is_asked_about_an_image_or_a_file(tmp_path):
    judge, image = Judge(), Image.new("RGB", (4, 4), "red")
    answers = ask(judge, image, ["Two?", Question("three", "Six??")], prompt="a square")
    assert {name: answer.verdict for name, answer in answers.items()} == {"Two?": "yes", "three": "no"}
    (case,) = judge.cases
    assert case.image is image and case.prompt == "a square"
    image.convert("RGBA").save(tmp_path / "red.png")
    assert list(ask(judge, tmp_path / "red.png", "One question?")) == ["One question?"]
    assert judge.cases[0].image.mode == "RGB" and judge.cases[0].image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(InputError, match=r"no image could be read from .*none.png"):
        ask(judge, tmp_path / "none.png", "Is it there?")


# A trainer around one's own model


def example(index: int = 0) -> dict:
    return {"features": torch.full((2, 4), float(index)), "ranks": [1, 2]}


def score(model, batch):
    return Scored(model(batch["features"]).squeeze(-1))


def trainer(folder: Path, data: Any, model: nn.Module | None = None, **changes: Any) -> PreferenceTrainer:
    options = {"max_steps": 2, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    given = {"score": score, "objective": make_objective("simpo", beta=1.0, simpo_gamma=0.0)}
    args = PreferenceConfig(str(folder / "run"), **(options | changes.pop("options", {})))
    return PreferenceTrainer(model or nn.Linear(4, 1), args, train_dataset=data, **(given | changes))


class Plain(Dataset):
    """Five examples, read by index."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        return example(index)


class Visited(VisitDataset):
    """Five examples that say when they are read."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict:
        index, visit = index_and_visit
        return {**example(index), "item": index + 100, "again": visit}


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"features": [[i] * 4] * 2, "ranks": [1, 2]} for i in range(5)])


@pytest.mark.parametrize(
    "data", [Plain(), [example(i) for i in range(5)], rows()], ids=["torch", "list", "hf"]
)
def test_a_dataset_read_by_index_trains_and_is_told_item_and_visit(tmp_path, data):
    seen = []

    def watching(model, batch):
        seen.append((batch["item"].tolist(), batch["visit"].tolist(), batch["features"][:, 0, 0].tolist()))
        return score(model, {"features": batch["features"].float()})

    run = trainer(tmp_path, data, score=watching, options={"per_device_train_batch_size": 5})
    run.train()
    assert [sorted(items) for items, _, _ in seen] == [[0, 1, 2, 3, 4]] * 2
    assert all(items == values for items, _, values in seen), "each example has its own index"
    assert [visits for _, visits, _ in seen] == [[0] * 5, [1] * 5]
    assert run.evaluate(data)["eval_loss"] > 0 and len(seen) == 3
    assert run.evaluate({"held": data})["eval_held_loss"] > 0


def test_an_item_of_the_dataset_stays_and_a_visit_dataset_is_read_by_both(tmp_path):
    named = trainer(tmp_path, [{**example(), "item": 7}]).train_dataset
    assert (named[0, 3]["item"], named[0, 3]["visit"]) == (7, 3)
    visited = trainer(tmp_path, Visited()).train_dataset
    assert isinstance(visited, Visited) and visited[2, 9]["again"] == 9


class Stream(IterableDataset):
    def __iter__(self):
        yield example()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "train_dataset is missing: give the trainer a dataset"),
        ([], "train_dataset is empty: this list has no examples"),
        (Stream(), "train_dataset is a Stream, which has no length or cannot be read by index"),
        (
            rows().to_iterable_dataset(),
            r"train_dataset is a IterableDataset, .* list\(...\) of it if it fits",
        ),
        (datasets.DatasetDict(train=rows()), "train_dataset is a DatasetDict of train; give the trainer one"),
    ],
    ids=["none", "empty", "torch stream", "hf stream", "splits"],
)
def test_a_dataset_that_cannot_be_read_is_refused_by_name(tmp_path, data, said):
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, data)
    with pytest.raises(InputError, match=said.replace("train_dataset", "eval_dataset 'held'")):
        trainer(tmp_path, Plain(), eval_dataset={"held": data})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([(1, 2)], "example 0 of list is a tuple; return a dict with the inputs of `score` and `ranks`"),
        ([{"features": torch.zeros(2, 4)}], "the batch has no `ranks` .*, only item, features, visit"),
        ([{**example(), "image": Image.new("L", (1, 1))}], "the examples' 'image' cannot be stacked"),
    ],
    ids=["tuples", "no ranks", "pictures"],
)
def test_an_example_that_does_not_fit_is_named_at_the_first_batch(tmp_path, data, said):
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, data).train()


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda model, batch: score(model, batch).scores, "score returned a Tensor; return a prefopt.Scored"),
        (
            lambda model, batch: Scored(score(model, batch).scores[:, 0]),
            r"scores of shape \(8,\), and the batch's ranks have \(8, 2\): return one score for each",
        ),
    ],
    ids=["a tensor", "one number"],
)
@pytest.mark.parametrize("reference", [False, True])
def test_what_a_score_may_return_is_said_at_the_first_batch(tmp_path, score, said, reference):
    model = nn.Linear(4, 1)
    frozen = {"objective": make_objective(beta=1.0), "reference_model": frozen_copy(model)}
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, Plain(), model, score=score, **(frozen if reference else {})).train()


def test_what_an_objective_needs_is_declared_and_given(tmp_path):
    cpo = make_objective("cpo", beta=1.0)
    with pytest.raises(InputError, match=r"needs nll, which Linear cannot .*`extras = frozenset\({'nll'}\)`"):
        trainer(tmp_path, Plain(), objective=cpo)

    class Forgetful:
        extras = frozenset({"nll"})

        def __call__(self, model, batch):
            return score(model, batch)

    with pytest.raises(
        InputError, match=r"declares nll in its `extras` and returned none: return Scored\(sc"
    ):
        trainer(tmp_path, Plain(), objective=cpo, score=Forgetful()).train()


def test_a_reference_that_is_missing_is_named(tmp_path):
    dpo = make_objective("dpo", beta=1.0)
    with pytest.raises(
        InputError, match=r"no adapters .* give the trainer reference_model=frozen_copy\(model\)"
    ):
        trainer(tmp_path, Plain(), objective=dpo).train()
    with pytest.raises(InputError, match=r"--reference cache: .* give their dataset a property `identity`"):
        trainer(tmp_path, Plain(), objective=dpo, options={"reference": "cache"}).train()
    data = [{**example(i), "reference": torch.tensor([0.0, i / 2])} for i in range(5)]
    zero = nn.Linear(4, 1)
    nn.init.zeros_(zero.weight)
    run = trainer(tmp_path / "own", data, zero, objective=dpo, options={"per_device_train_batch_size": 5})
    run.train()
    expected = -nn.functional.logsigmoid(torch.arange(5) / 2).mean().item()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_dataset_with_an_identity_has_its_reference_cached(tmp_path):
    class Known(Plain):
        identity = {"examples": "five"}  # noqa: RUF012

    options = {"reference": "cache", "cache_dir": str(tmp_path / "cache")}
    run = trainer(tmp_path, Known(), objective=make_objective(beta=1.0), options=options)
    run.train()
    assert run.train_dataset[3, 0]["reference"].shape == (2,)
    assert run.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("with_item", [True, False])
def test_a_loss_that_is_not_finite_names_the_examples_or_the_rows(tmp_path, with_item):
    def collate(examples):
        batch = {name: torch.stack([torch.as_tensor(e[name]) for e in examples]) for name in examples[0]}
        return batch if with_item else {name: batch[name] for name in ("features", "ranks")}

    data = [example(torch.nan if index == 3 else index) for index in range(5)]
    options = {"per_device_train_batch_size": 5}
    run = trainer(tmp_path, data, data_collator=collate, options=options)
    row = [index for index, _ in run._get_train_sampler()].index(3)
    said = rf"not finite at step 1, for row {row} of a batch of 5 \(counted from 0; if the batch had `item`"
    if with_item:
        said = r"not finite at step 1, for item 3 \(the batch's items are \[.*\]\)\. The last checkpoint"
    with pytest.raises(InputError, match=said):
        run.train()


def test_a_loss_that_is_not_finite_in_an_evaluation_names_its_example(tmp_path):
    class Named(Plain):
        def __init__(self, name, bad):
            self.name, self.bad = name, bad

        def __getitem__(self, index):
            return example(torch.nan if index == self.bad else index)

        def where(self, index):
            return f"{self.name}: row {index}"

    run = trainer(tmp_path, Named("train.jsonl", None), eval_dataset=Named("test.jsonl", 2))
    with pytest.raises(InputError, match=r"not finite at step \d, for test\.jsonl: row 2 \(the batch"):
        run.evaluate()


def test_an_entry_that_some_examples_lack_is_named(tmp_path):
    """Guards: soft labels that are left out where the first example of a batch has none."""
    data = [example(0), {**example(1), "p_chosen": 0.75}]
    with pytest.raises(InputError, match=r"example 0 of a batch has no 'p_chosen', and others have"):
        trainer(tmp_path, data, options={"per_device_train_batch_size": 2}).train()


# Saving


class Halved(nn.Linear):
    def save_pretrained(self, folder, state_dict=None): ...


class Unsaved(Halved):
    def load_weights(self, folder): ...
    def save_pretrained(self, folder): ...


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Halved, "Halved has one of the methods save_pretrained and load_weights, and needs both"),
        (
            Unsaved,
            r"Unsaved cannot be saved: give it save_pretrained\(folder, state_dict=None\).*'state_dict'",
        ),
    ],
)
def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, kind, said):
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, Plain(), kind(4, 1))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, features):
        return self.second(self.first(features)).sum(-1, keepdim=True)


def test_a_plain_module_is_saved_and_resumed(tmp_path):
    """Four steps at once, and two and two: the same weights, which the file of the last checkpoint holds."""
    once, halves = tmp_path / "once", tmp_path / "halves"
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}

    def run(folder: Path, steps: int, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        made = trainer(folder, Plain(), Tied(), options={**options, "max_steps": steps})
        made.train(**more)
        made.save_model()
        return made.model

    whole = run(once, 4)
    run(halves, 2)
    resumed = run(halves, 4, resume_from_checkpoint="latest")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    fresh = Tied()
    load_model(fresh, halves / "run" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))
    (halves / "run" / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"weights of a Tied in .*checkpoint-4/model.safetensors cannot be loaded"
    ):
        run(halves, 6, resume_from_checkpoint="latest")


def test_make_objective_checks_its_options():
    assert isinstance(make_objective("ipo", beta=0.1), Objective)
    scored, batch = Scored(torch.tensor([[2.0, 1.0]])), {"ranks": torch.tensor([[1, 2]])}
    simpo = make_objective("simpo", beta=0.5, simpo_gamma=0.25)(scored, None, batch)
    assert isinstance(simpo, Loss)
    assert simpo.losses.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-0.25)).item())
    with pytest.raises(InputError, match="--beta is 0"):
        make_objective(beta=0)
    with pytest.raises(InputError, match="--loss_type is 'sigmoid'; choose from dpo"):
        make_objective("sigmoid", beta=1.0)
