"""`vlm_dpo.py` and `vlm_sft.py` as a user runs them: first losses, options, what they save and refuse."""

import json
import math
import runpy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from launching import ROOT, launch, torchrun
from peft import PeftModel
from running import logged
from tiny_vlm import LLAVA_1_5, PEFT_ON_TRANSFORMERS_5, tiny_llava, vision_pairs
from torch import Tensor
from transformers import AutoProcessor

from prefopt.errors import InputError
from prefopt.reference import adapters_off
from prefopt.vlm.models import ADAPTER_FILE, load_vlm

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

RECIPE = "recipes/vlm_dpo.py"
LN2 = math.log(2)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that every run here shares: a tiny LLaVA, twelve pairs, a step of four."""
    folder = tmp_path_factory.mktemp("setting")
    vision_pairs().save_to_disk(folder / "pairs")
    return {
        "model_name_or_path": tiny_llava(folder / "model", template=LLAVA_1_5),
        "dataset_name": str(folder / "pairs"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }


train = partial(running.train, name="vlm_dpo")


@pytest.mark.parametrize("options", [{}, {"bf16": None, "dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_the_first_loss_is_ln_2_by_path(setting: dict, options: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = launch(RECIPE, setting | {"output_dir": run} | options, tmp_path / "output")
    assert launched.wait(300) == 0, launched.text()
    losses = logged(run)
    assert len(losses) == 2
    assert losses[0] == pytest.approx(LN2, abs=1e-6)
    assert losses[1] != pytest.approx(LN2, abs=1e-6)
    assert logged(run, "rewards/margins")[0] == 0
    assert logged(run, "rewards/accuracies")[0] == 0.5
    assert "12 rows" in launched.text()
    assert "2 a batch x 2 accumulated x 1 processes = 4 a step" in launched.text()


def test_a_saved_adapter_is_the_trained_policy(setting: dict, tmp_path: Path) -> None:
    trainer = train(setting, tmp_path)
    again = PeftModel.from_pretrained(load_vlm(setting["model_name_or_path"])[0], str(tmp_path)).eval()
    batch = trainer.data_collator([trainer.train_dataset[i, 0] for i in range(3)])
    with torch.no_grad():
        scores = trainer.score(again, batch).scores
        assert torch.equal(scores, trainer.score(trainer.model.eval(), batch).scores)
        with again.disable_adapter():
            assert not torch.equal(scores, trainer.score(again, batch).scores)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == LLAVA_1_5
    assert json.loads((tmp_path / "config.json").read_text())["options"]["beta"] == 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_full_fine_tuning_starts_at_ln_2_and_saves_a_model(setting: dict, bf16: bool, tmp_path: Path) -> None:
    trainer = train(setting, tmp_path, use_peft=False, bf16=bf16, learning_rate=1e-4)
    assert logged(tmp_path)[0] == pytest.approx(LN2, abs=1e-6)
    again, _ = load_vlm(str(tmp_path / "model"))
    base, _ = load_vlm(setting["model_name_or_path"])
    trained, untrained = trainer.model.state_dict(), base.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in again.state_dict().items())
    frozen = trainer.reference_model.state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in untrained.items())
    assert any(not torch.equal(value, trained[name]) for name, value in untrained.items())
    assert "options" in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"loss_type": "ipo", "beta": 0.25}, (1 / (2 * 0.25)) ** 2),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "robust", "label_smoothing": 0.2}, LN2),
        ({"label_smoothing": 0.2}, LN2),
        ({"max_length": 60}, LN2),
        ({"shared_prefix": False}, LN2),
        ({"row_tokens": 400}, LN2),
        ({"lora_dropout": 0.5, "lora_target_modules": ["q_proj"], "use_rslora": True}, LN2),
        ({"attn_implementation": "eager", "seed": 3}, LN2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_option_runs(setting: dict, options: dict, first: float, tmp_path: Path) -> None:
    """The first loss of each objective at a margin of zero."""
    train(setting, tmp_path, **options)
    assert logged(tmp_path)[0] == pytest.approx(first, abs=1e-6)
    assert logged(tmp_path)[1] != pytest.approx(first, abs=1e-7)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


@pytest.mark.parametrize("loss_type", ["cpo", "simpo"])
def test_losses_without_a_reference_start_at_the_hand_worked_value(setting, tmp_path, loss_type) -> None:
    """On the base model's scores of the first step's rows, in float64: beta 0.1, gamma 0.5."""
    trainer = train(setting, tmp_path, loss_type=loss_type, max_steps=1)
    rows = [index for index, _ in list(trainer._get_train_sampler())[:4]]
    batch = trainer.data_collator([trainer.train_dataset[index, 0] for index in rows])
    model, _ = load_vlm(setting["model_name_or_path"])
    with torch.no_grad():
        chosen, rejected = trainer.score(model.eval(), batch).scores.double().unbind(1)
    tokens = batch["tokens"].double()
    expected = softplus(-(0.1 * (chosen / tokens[:, 0] - rejected / tokens[:, 1]) - 0.5)).mean()
    if loss_type == "cpo":
        expected = softplus(-0.1 * (chosen - rejected)).mean() - chosen.sum() / tokens[:, 0].sum()
    assert logged(tmp_path)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["vlm_dpo", "vlm_sft"])
def test_a_likelihood_is_the_same_under_any_split_of_the_step(setting, tmp_path, name: str) -> None:
    """Guards: a mean over tokens of each batch apart, which weighs short answers more in small batches.

    Four rows a step: in one batch, in two, in four, and in two processes; CPO's likelihood term, and SFT.
    """
    loss = {"loss_type": "cpo"} if name == "vlm_dpo" else {}
    splits = {"whole": (4, 1), "two": (2, 2), "four": (1, 4)}
    for split, (batch, accumulated) in splits.items():
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = running.train(setting, tmp_path / split, name, max_steps=3, **loss, **options)
    batch = trainer.data_collator([trainer.train_dataset[index, 0] for index in range(12)])
    assert batch["tokens"][:, 0].unique().numel() > 3, "or any weights would do"
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3}
    torchrun(f"recipes/{name}.py", setting | options | loss | {"output_dir": tmp_path / "processes"})
    config = json.loads((tmp_path / "processes" / "config.json").read_text())
    assert "2 a batch x 1 accumulated x 2 processes = 4 a step" in config["arithmetic"]
    whole = logged(tmp_path / "whole")
    assert len(set(whole)) == 3
    for split in ("two", "four", "processes"):
        assert logged(tmp_path / split) == pytest.approx(whole, abs=1e-6)


def test_sft_starts_at_the_base_s_loss_and_learns_the_chosen_answers(setting: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = launch("recipes/vlm_sft.py", setting | {"output_dir": run}, tmp_path / "output")
    assert launched.wait(300) == 0, launched.text()
    assert "12 rows, the chosen side of each pair" in launched.text()
    trainer = running.train(setting, tmp_path / "again", "vlm_sft", max_steps=1)
    rows = [index for index, _ in list(trainer._get_train_sampler())[:4]]
    batch = trainer.data_collator([trainer.train_dataset[index, 0] for index in rows])
    model, _ = load_vlm(setting["model_name_or_path"])
    with torch.no_grad():
        scores = trainer.score(model.eval(), batch).scores
    assert batch["tokens"].shape == scores.shape == (4, 1)
    assert logged(run)[0] == pytest.approx(-(scores.sum() / batch["tokens"].sum()).item(), abs=1e-5)
    assert logged(run)[1] < logged(run)[0]
    again = PeftModel.from_pretrained(model, str(run))
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in again.named_parameters())


def test_what_is_kept_changes_no_loss(setting: dict, tmp_path: Path, capsys) -> None:
    """Guards: trl, ms-swift and LLaMA-Factory refuse to keep reference scores of rows with images."""
    epochs = {
        "max_steps": 6,
        "vision_features": "cache",
        "reference": "cache",
        "cache_dir": str(tmp_path / "c"),
    }
    live = train(setting, tmp_path / "live", max_steps=6)
    kept = train(setting, tmp_path / "kept", **epochs)
    assert logged(tmp_path / "kept") == pytest.approx(logged(tmp_path / "live"), abs=1e-6)
    batch = kept.data_collator([kept.train_dataset[i, 0] for i in range(3)])
    assert "images" not in batch
    assert batch["reference"].shape == (3, 2)
    with torch.no_grad(), adapters_off(live.model) as model:
        expected = live.score(model, live.data_collator([live.train_dataset[i, 0] for i in range(3)])).scores
    torch.testing.assert_close(batch["reference"], expected, rtol=0, atol=1e-5)
    shards = sorted((tmp_path / "c").rglob("*.safetensors"))
    assert len(shards) == 2
    written = [shard.stat().st_mtime_ns for shard in shards]
    train(setting, tmp_path / "again", **epochs, beta=0.3)  # another beta shares what is kept
    assert [shard.stat().st_mtime_ns for shard in sorted((tmp_path / "c").rglob("*.safetensors"))] == written
    with pytest.raises(InputError, match=r"cache .* does not fit this run. max_length: None .*, 90"):
        train(setting, tmp_path / "other", **epochs, max_length=90)
    train(setting, tmp_path / "cut", **epochs | {"vision_features": "live"}, max_length=90)
    assert len(list((tmp_path / "c" / "reference").iterdir())) == 2


def test_scores_of_an_adapter_with_another_scaling_are_its_own(setting: dict, tmp_path: Path) -> None:
    """Guards: cached scores of a reference whose tensors are the same and whose alpha is not."""
    train(setting, tmp_path / "first")
    twice = tmp_path / "twice"
    shutil.copytree(tmp_path / "first", twice)
    config = json.loads((twice / "adapter_config.json").read_text())
    config["lora_alpha"] *= 10
    (twice / "adapter_config.json").write_text(json.dumps(config))
    options = {"reference": "cache", "cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    for adapter in (tmp_path / "first", twice):
        run = tmp_path / f"from-{adapter.name}"
        train(setting, run, adapter_name_or_path=str(adapter), **options)
        assert logged(run)[0] == pytest.approx(LN2, abs=1e-6)


def test_only_the_images_that_a_short_run_reads_are_encoded(setting: dict, tmp_path: Path, capsys) -> None:
    trainer = train(setting, tmp_path, max_steps=1, vision_features="cache")
    keys = trainer.train_dataset.image_keys()
    read = {keys[item] for item, _ in list(trainer._get_train_sampler())[:4]}
    assert {key for key in keys if key in trainer.data_collator.features} == read
    assert f"{len(read)} images to encode: about 00:00" in capsys.readouterr().out
    assert len(read) < len(set(keys))


def test_log_p_of_both_sides_is_logged_as_trl_does(setting: dict, tmp_path: Path) -> None:
    """Of a step over all examples, before any is trained on."""
    trainer = train(setting, tmp_path, max_steps=1, gradient_accumulation_steps=6)
    batch = trainer.data_collator([trainer.train_dataset[i, 0] for i in range(12)])
    with torch.no_grad(), adapters_off(trainer.model) as model:
        chosen, rejected = trainer.score(model, batch).scores.mean(0).tolist()
    assert logged(tmp_path, "logps/chosen") == pytest.approx([chosen], abs=1e-4)
    assert logged(tmp_path, "logps/rejected") == pytest.approx([rejected], abs=1e-4)
    assert chosen != pytest.approx(rejected, abs=1e-2) and max(chosen, rejected) < 0


def test_held_out_images_are_measured_and_not_trained_on(setting: dict, tmp_path: Path) -> None:
    options = {"test_size": 0.25, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = running.train(setting, tmp_path, "vlm_sft", **options)
    train_items, test_items = trainer.train_dataset.items, trainer.eval_dataset.items
    assert len(test_items) == 3
    assert sorted(train_items + test_items) == list(range(12))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(measured) == 2
    with torch.no_grad():
        batch = trainer.data_collator([trainer.eval_dataset[i, 0] for i in range(3)])
        scores = trainer.score(trainer.model.eval(), batch).scores
    assert measured[-1] == pytest.approx(-(scores.sum() / batch["tokens"].sum()).item(), abs=1e-4)
    with pytest.raises(
        InputError,
        match="--eval_strategy measures examples that are held out; name a --dataset_test_split or",
    ):
        running.train(setting, tmp_path / "other", "vlm_sft", eval_strategy="steps")


def test_a_model_that_cannot_share_prompts_says_why(
    setting: dict, tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(
        "prefopt.vlm.training.unshareable", lambda config: "its attention slides over 8 tokens"
    )
    trainer = train(setting, tmp_path)
    assert "a prompt of its own: its attention slides over 8 tokens" in caplog.text
    assert "attention_mask" in trainer.data_collator([trainer.train_dataset[0, 0]])
    assert logged(tmp_path)[0] == pytest.approx(LN2, abs=1e-6)
    with pytest.raises(
        InputError, match=r"need shared prefixes, and .* cannot have them: its attention slides"
    ):
        train(setting, tmp_path / "cache", vision_features="cache")


def test_activation_checkpointing_changes_no_loss(setting: dict, tmp_path: Path) -> None:
    train(setting, tmp_path / "plain")
    train(setting, tmp_path / "checkpointed", activation_checkpointing=True)
    assert logged(tmp_path / "checkpointed") == pytest.approx(logged(tmp_path / "plain"), abs=1e-6)


def test_dpo_goes_on_from_a_trained_adapter(setting: dict, tmp_path: Path) -> None:
    train(setting, tmp_path / "first")
    trainer = train(setting, tmp_path / "second", adapter_name_or_path=str(tmp_path / "first"))
    assert logged(tmp_path / "second")[0] == pytest.approx(LN2, abs=1e-6)
    again = PeftModel.from_pretrained(load_vlm(setting["model_name_or_path"])[0], str(tmp_path / "second"))
    batch = trainer.data_collator([trainer.train_dataset[0, 0]])
    with torch.no_grad():
        assert torch.equal(
            trainer.score(again.eval(), batch).scores, trainer.score(trainer.model.eval(), batch).scores
        )


def test_a_resumed_run_is_the_uninterrupted_one(setting: dict, tmp_path: Path) -> None:
    every_step = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    train(setting, tmp_path / "whole", **every_step)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train(setting, tmp_path / "resumed", **every_step, resume_from_checkpoint=checkpoint)
    whole, resumed = ((tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": "./nowhere"}, "there is no ./nowhere"),
        ({"model_name_or_path": ""}, "--model_name_or_path is empty"),
        ({"dataset_name": "./nowhere"}, "nowhere"),
        ({"max_length": 20}, "max_length 20 leaves no room"),
        ({"max_length": 0}, "--max_length is 0"),
        ({"beta": 0.0}, "--beta is 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing is 0.5"),
        ({"reference": "cache", "loss_type": "cpo"}, "--reference cache: this objective has no reference"),
        ({"vision_features": "cache", "use_peft": False}, "--vision_features cache"),
        ({"row_tokens": 900, "shared_prefix": False}, "need shared prefixes"),
        ({"use_peft": False, "dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"adapter_name_or_path": "./nowhere"}, "there is no ./nowhere"),
        ({"lora_target_modules": ["nothing"]}, "nothing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(setting: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(setting, tmp_path, **options)


def test_bad_input_ends_with_one_message_and_exit_code_2(
    setting: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", "./nowhere", "--dataset_name", setting["dataset_name"]]
    monkeypatch.setattr("sys.argv", [RECIPE, *flags, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / RECIPE), run_name="__main__")
    said = capsys.readouterr().err
    assert "error: --model_name_or_path: there is no ./nowhere" in said
    assert "Traceback" not in said
