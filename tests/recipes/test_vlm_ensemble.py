"""`vlm_qlora_ensemble.py` as a user runs it: members as if trained alone, their average, killed anywhere."""

import functools
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from launching import die_at_save, launch
from peft import PeftModel
from running import logged
from tiny_vlm import LLAVA_1_5, PEFT_ON_TRANSFORMERS_5, tiny_llava, vision_pairs

from prefopt.adapters import ADAPTER_FILE
from prefopt.errors import InputError
from prefopt.vlm.models import load_vlm

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

RECIPE = "recipes/vlm_qlora_ensemble.py"
MEMBERS = ["lora_alpha=16 lora_dropout=0.05", "lora_alpha=8", "lora_r=4, seed=7 learning_rate=0.002"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("setting")
    vision_pairs().save_to_disk(folder / "rows")
    return {
        "model_name_or_path": tiny_llava(folder / "model", template=LLAVA_1_5),
        "dataset_name": str(folder / "rows"),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-3,
        "lora_r": 8,
        "members": MEMBERS,
    }


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    launched = launch(RECIPE, setting | {"output_dir": folder, "average_rank": 8}, folder.parent / "log")
    assert launched.wait(300) == 0, launched.text()
    assert "average: rank 20, 100.00% of the energy kept" in launched.text()
    assert "average-rank-8: rank 8, " in launched.text()
    return folder


def test_a_member_is_what_vlm_sft_trains_alone(setting, whole, tmp_path) -> None:
    """Whatever was trained on the same loaded base before it."""
    alone = {name: value for name, value in setting.items() if name != "members"}
    own = {"lora_r": 4, "seed": 7, "learning_rate": 0.002}
    running.train(alone, tmp_path, "vlm_sft", **own)
    assert logged(tmp_path) == logged(whole / "member-3")
    assert (tmp_path / ADAPTER_FILE).read_bytes() == (whole / "member-3" / ADAPTER_FILE).read_bytes()
    assert len({tuple(logged(whole / f"member-{n}")) for n in (1, 2, 3)}) == 3


def test_the_average_is_the_mean_of_the_members_weights(setting, whole) -> None:
    def update(folder: Path) -> dict[str, torch.Tensor]:
        model = PeftModel.from_pretrained(load_vlm(setting["model_name_or_path"])[0], str(folder))
        merged = model.merge_and_unload().state_dict()
        base = load_vlm(setting["model_name_or_path"])[0].state_dict()
        return {name: merged[name].double() - base[name].double() for name in base}

    members = [update(whole / f"member-{n}") for n in (1, 2, 3)]
    average = update(whole / "average")
    for name, value in average.items():
        torch.testing.assert_close(value, sum(m[name] for m in members) / 3, rtol=0, atol=1e-6)
    assert max(value.abs().max() for value in average.values()) > 1e-4


def test_killed_in_the_second_member_the_ensemble_is_bit_identical(setting, whole, tmp_path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    same = setting | {"output_dir": folder, "average_rank": 8}
    running_one = launch(RECIPE, same, log, functools.partial(die_at_save, 14))
    assert running_one.wait(300) == -9, running_one.text()
    assert (folder / "member-1" / "member.json").exists()
    assert not (folder / "member-2" / "member.json").exists()
    again = launch(RECIPE, same | {"resume_from_checkpoint": None}, log)
    assert again.wait(300) == 0, again.text()
    assert "member-1: {" not in again.text().split("resuming from")[-1]
    for part in ("member-1", "member-2", "member-3", "average", "average-rank-8"):
        assert (folder / part / ADAPTER_FILE).read_bytes() == (whole / part / ADAPTER_FILE).read_bytes()
    with pytest.raises(InputError, match="member-1 is there already: continue with --resume_from_checkpoint"):
        running.train(setting, folder, "vlm_qlora_ensemble")
    with pytest.raises(InputError, match=r"was trained with learning_rate 0\.001, and now it is 0.01"):
        running.train(
            setting, folder, "vlm_qlora_ensemble", resume_from_checkpoint="latest", learning_rate=0.01
        )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["lora_alpha=16"], "has two or more"),
        (["lora_alpha=16", "lora_beta=3"], "'lora_beta=3' in 'lora_beta=3'"),
        (["lora_alpha=16", "lora_alpha=x"], "'lora_alpha=x' .* no such value"),
        (["lora_alpha=16", "lora_alpha=8 lora_alpha=4"], "each once"),
        (["lora_alpha=16", "use_rslora=maybe"], "is not true or false"),
    ],
)
def test_members_that_cannot_be_read_are_named(setting, tmp_path, members, message) -> None:
    with pytest.raises(InputError, match=message):
        running.train(setting, tmp_path, "vlm_qlora_ensemble", members=members)
