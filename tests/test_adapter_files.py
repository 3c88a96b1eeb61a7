"""Adapters that cannot be averaged are refused with a reason that names them, before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import edit_config, edit_tensors, save_random

from prefopt.adapters import ADAPTER_FILE, CONFIG_FILE
from prefopt.averaging import average_adapters
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE as DIFFUSION_FILE

A, B = "base_model.model.narrow.lora_A.weight", "base_model.model.narrow.lora_B.weight"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora.*magnitudes are not linear"),
    "another kind": ({"peft_type": "LOHA"}, "type LOHA"),
    "biases of the factors": ({"lora_bias": True}, "lora_bias.*biases beside the factors"),
    "experts": ({"target_parameters": ["experts.up"]}, "several experts"),
    "another update": ({"use_qalora": True}, "use_qalora.*not scaling"),
    "changed base weights": ({"init_lora_weights": "pissa"}, "initialised by pissa"),
    "another base": ({"base_model_name_or_path": "b"}, "base_model_name_or_path: 'a' and 'b'"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "another rank": ({"r": 8}, "rank 4 in the tensors, 8 in the config"),
    "no rank": ({"r": None}, "None in the config"),
    "no alpha": ({"lora_alpha": None}, "alpha of .*narrow is None"),
    "alpha not finite": ({"alpha_pattern": {"narrow": float("inf")}}, "alpha of .*narrow is inf"),
}
TENSORS: dict[str, tuple[Any, str]] = {
    "no pair": (lambda t: {name: v for name, v in t.items() if name != B}, "lora_A.* belongs to no pair"),
    "empty": (lambda t: {}, "holds no LoRA factors"),
    "no factors": (lambda t: {"base_model.model.head.weight": t[A]}, "no LoRA factors, and 1 other"),
    "no values": (lambda t: {**t, A: torch.zeros(0, 8), B: torch.zeros(6, 0)}, "is empty"),
    "not finite": (lambda t: {**t, A: t[A] / 0}, "not finite"),
    "another layer": (lambda t: {k.replace("narrow", "wide"): v for k, v in t.items()}, "different layers"),
    "another width": (lambda t: {**t, A: torch.ones(4, 7)}, r"\(4, 8\) and \(6, 4\).*\(4, 7\)"),
    "no product": (lambda t: {**t, A: torch.ones(3, 8)}, "do not make a matrix product"),
    "grouped convolution": (
        lambda t: {**t, A: torch.ones(4, 8, 3, 3), B: torch.ones(6, 2, 1, 1)},
        "grouped convolution",
    ),
    "magnitudes": (lambda t: {**t, "base_model.model.narrow.lora_magnitude_vector": t[A][0].clone()}, "DoRA"),
    "biases": (
        lambda t: {**t, B.replace("weight", "bias"): t[A][0].clone()},
        "lora_B.bias belongs to no pair",
    ),
    "other names": (
        lambda t: {k.replace("base_model", "x"): v for k, v in t.items()},
        "no name of its format",
    ),
}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    folders = [save_random(tmp_path / f"{i}", i, target_modules=["narrow"], r=4) for i in range(2)]
    for folder in folders:
        edit_config(folder, base_model_name_or_path="a")
    return folders


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_says_against_averaging_is_named(two: list[Path], tmp_path: Path, case: str) -> None:
    options, reason = CONFIGS[case]
    edit_config(two[1], **options)
    with pytest.raises(InputError, match=reason) as raised:
        average_adapters(two, tmp_path / "average")
    assert str(two[1]) in str(raised.value) and not (tmp_path / "average").exists()


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_averaged_are_named(two: list[Path], tmp_path: Path, case: str) -> None:
    change, reason = TENSORS[case]
    edit_tensors(two[1], change)
    with pytest.raises(InputError, match=reason) as raised:
        average_adapters(two, tmp_path / "average")
    assert str(two[1]) in str(raised.value) and not (tmp_path / "average").exists()


def test_a_dora_of_peft_is_refused(two: list[Path], tmp_path: Path) -> None:
    dora = save_random(tmp_path / "dora", target_modules=["narrow"], r=4, use_dora=True)
    with pytest.raises(InputError, match=r"dora is no plain LoRA \(use_dora\)"):
        average_adapters([two[0], dora], tmp_path / "average")
    edit_config(dora, use_dora=False)  # the tensors tell
    with pytest.raises(InputError, match="lora_magnitude_vector"):
        average_adapters([two[0], dora], tmp_path / "average")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [0.5, 0.6]}, "0.5, 0.6 sum to 1.1"),
        ({"weights": [float("nan"), 1.0]}, "finite"),
        ({"rank": 0}, r"in \[1, 8\]"),
        ({"rank": 9}, r"in \[1, 8\]"),
    ],
)
def test_weights_and_rank_have_to_fit(
    two: list[Path], tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        average_adapters(two, tmp_path / "average", **options)


def test_what_is_no_adapter_is_named(two: list[Path], tmp_path: Path) -> None:
    average = tmp_path / "average"
    with pytest.raises(InputError, match="no adapters"):
        average_adapters([], average)
    with pytest.raises(InputError, match="nowhere"):
        average_adapters([two[0], "./nowhere"], average)
    with pytest.raises(InputError, match=r"holds the adapter .*1"):
        average_adapters(two, two[1])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not write"):
        average_adapters(two, tmp_path / "file")
    diffusion = tmp_path / "diffusion"
    diffusion.mkdir()
    layer = "unet.mid_block.attentions.0.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    save_file(state, diffusion / DIFFUSION_FILE)
    with pytest.raises(InputError, match="not of one format"):
        average_adapters([two[0], diffusion], average)
    save_file(state, diffusion / DIFFUSION_FILE, {"alpha": "4"})
    with pytest.raises(InputError, match="alpha in its header"):
        average_adapters([diffusion], average)
    save_file({**state, "unet.conv_in.diff": torch.ones(1)}, diffusion / DIFFUSION_FILE)
    with pytest.raises(InputError, match="diff belongs to no pair"):
        average_adapters([diffusion], average)
    save_file(load_file(two[0] / ADAPTER_FILE), diffusion / DIFFUSION_FILE)
    with pytest.raises(InputError, match="no name of its format"):
        average_adapters([diffusion], average)
    kept = (two[1] / CONFIG_FILE).read_text()
    for text, said in (("{", "is no JSON"), ("[]", "holds no JSON object but a list")):
        (two[1] / CONFIG_FILE).write_text(text)
        with pytest.raises(InputError, match=rf"adapter_config\.json {said}"):
            average_adapters(two, average)
    (two[1] / CONFIG_FILE).write_text(kept)
    (two[1] / ADAPTER_FILE).write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is no whole file of safetensors"):
        average_adapters(two, average)
    (two[1] / ADAPTER_FILE).rename(two[1] / "adapter_model.bin")
    with pytest.raises(InputError, match=f"no {ADAPTER_FILE}"):
        average_adapters(two, average)


def test_an_average_too_large_for_its_dtype_is_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["narrow"], "r": 2, "lora_alpha": 2}
    folders = [save_random(tmp_path / f"{i}", i, torch.float16, **options) for i in range(2)]
    edit_tensors(folders[0], lambda tensors: {name: value * 0 + 6e4 for name, value in tensors.items()})
    with pytest.raises(InputError, match=r"too large for torch\.float16"):
        average_adapters(folders, tmp_path / "average", weights=[3.0, -2.0])
