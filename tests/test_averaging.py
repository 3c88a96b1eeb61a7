"""Averages of LoRA adapters: against dense arithmetic, against peft's own, and as files that peft loads."""

import json
import time
from pathlib import Path

import pytest
import torch
from launching import launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_adapters import Small, deltas, deltas_of, edit_config, edit_tensors, error, save_mixed, save_random
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, tiny_llava
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from prefopt.adapters import ADAPTER_FILE, CONFIG_FILE
from prefopt.averaging import Update, average_adapters, concatenate, truncate

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)


def dense(update: Update) -> Tensor:
    return update.scale * update.B.double() @ update.A.double()


def random_updates(d_out: int, d_in: int, ranks: tuple[int, ...], seed: int = 0) -> list[Update]:
    torch.manual_seed(seed)
    return [Update(torch.randn(r, d_in), torch.randn(d_out, r), 0.3 + i) for i, r in enumerate(ranks)]


# The mathematics


@pytest.mark.parametrize("ranks", [(4,), (4, 4, 4, 4), (2, 8, 5), (16, 16, 16)])
def test_side_by_side_is_the_sum(ranks: tuple[int, ...]) -> None:
    """Also where the ranks' sum is more than the layer has: 48 in a layer of 40 x 24."""
    updates = random_updates(40, 24, ranks)
    together = concatenate(updates)
    assert len(together.A) == together.B.shape[1] == sum(ranks) and together.scale == 1
    assert error(dense(together), torch.stack([dense(u) for u in updates]).sum(0)) < 1e-14


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 24])
def test_truncation_is_the_best_of_its_rank(rank: int) -> None:
    """Against the SVD of the dense matrix, its error and its energy; from 12 on nothing is lost."""
    updates = random_updates(40, 24, (4, 8))
    whole = torch.stack([dense(u) for u in updates]).sum(0)
    best, energy = truncate(concatenate(updates), rank)
    U, S, Vh = torch.linalg.svd(whole)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert error(dense(best), expected) < 1e-12
    lost = (dense(best) - whole).square().sum().item()
    assert lost == pytest.approx(S[rank:].square().sum().item(), abs=1e-9)
    assert energy.share == pytest.approx((S[:rank].square().sum() / S.square().sum()).item(), rel=1e-12)
    assert (energy.share > 1 - 1e-12) == (rank >= 12)


def test_an_update_of_nothing_keeps_everything() -> None:
    best, energy = truncate(Update(torch.randn(4, 8), torch.zeros(6, 4)), 2)
    assert energy.share == 1 and not dense(best).any()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.size = max([self.size, *sizes])
        return result


def test_a_large_layer_takes_a_second_and_no_dense_matrix() -> None:
    """4096 x 4096, four adapters of rank 16, truncated to 16: a dense SVD takes more than a minute."""
    updates = random_updates(4096, 4096, (16,) * 4)
    start = time.perf_counter()
    with LargestTensor() as largest:
        best, energy = truncate(concatenate(updates), 16)
    assert time.perf_counter() - start < 5
    assert largest.size <= 4096 * 64
    assert best.A.shape == (16, 4096) and best.B.shape == (4096, 16)
    assert 0.25 < energy.share < 1


# peft's folders


def average_of(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    every = [deltas(folder) for folder in folders]
    return {
        layer: torch.stack([w * delta[layer].double() for w, delta in zip(weights, every, strict=True)]).sum(
            0
        )
        for layer in every[0]
    }


@pytest.mark.parametrize("weights", [None, [0.5, 0.7, -0.2]], ids=["equal", "given"])
def test_the_average_is_exact(tmp_path: Path, weights: list[float] | None) -> None:
    """Of adapters whose ranks, alphas, patterns and rsLoRA differ, on layers of every kind."""
    folders = save_mixed(tmp_path)
    average = average_adapters(folders, tmp_path / "average", weights=weights)
    expected = average_of(folders, weights or [1 / 3] * 3)
    written = deltas(tmp_path / "average")
    assert len(expected) == 4 and written.keys() == expected.keys()
    for layer, value in written.items():
        assert error(value, expected[layer]) < 1e-6
    assert average.rank == 5 + 2 + 4 and average.energy == 1
    config = json.loads((tmp_path / "average" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (11, 11, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["lora_dropout"] == 0


def test_neither_averaged_factors_nor_pefts_linear_are_the_average(tmp_path: Path) -> None:
    """Guards both, on the four adapters of one ensemble: r = 4, alphas 4, 2, 4, 2."""
    options = {"target_modules": ["narrow", "wide"], "r": 4}
    folders = [save_random(tmp_path / f"{i}", i, lora_alpha=4 - i % 2 * 2, **options) for i in range(4)]
    expected = average_of(folders, [0.25] * 4)
    average_adapters(folders, tmp_path / "average")
    ours = deltas(tmp_path / "average")

    names = [f"adapter{i}" for i in range(4)]
    model = PeftModel.from_pretrained(Small(), str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    model.add_weighted_adapter(names, [0.25] * 4, "linear", combination_type="linear")
    linear = deltas_of(model, "linear")
    states = [load_file(folder / ADAPTER_FILE) for folder in folders]
    apart = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    for layer, value in expected.items():
        factors = 0.75 * apart[f"{layer}.lora_B.weight"] @ apart[f"{layer}.lora_A.weight"]
        assert error(ours[layer], value) < 1e-6
        assert error(linear[layer], value) > 0.5 and error(factors, value) > 0.5


def test_identical_adapters_average_to_themselves(tmp_path: Path) -> None:
    """peft's `linear` makes three of them three times as strong; its `cat` and `svd` are right."""
    folder = save_random(tmp_path / "one", r=4, lora_alpha=6)
    ours = average_adapters([folder] * 3, tmp_path / "average", rank=4)
    assert ours.energy == pytest.approx(1)
    expected, written = deltas(folder), deltas(tmp_path / "average")
    for layer in expected:
        assert error(written[layer], expected[layer]) < 1e-6

    model = PeftModel.from_pretrained(Small(), str(folder), adapter_name="a")
    for name in "bc":
        model.load_adapter(str(folder), name)
    for kind, times in {"linear": 3, "cat": 1, "svd": 1}.items():
        model.add_weighted_adapter(list("abc"), [1 / 3] * 3, kind, combination_type=kind)
        theirs = deltas_of(model, kind)
        for layer in ("narrow", "wide"):
            found = theirs[f"base_model.model.{layer}"]
            assert error(found, times * expected[f"base_model.model.{layer}"]) < 1e-5


def test_a_smaller_rank_is_the_best_in_every_layer(tmp_path: Path) -> None:
    folders = save_mixed(tmp_path)
    average = average_adapters(folders, tmp_path / "average", rank=3)
    written, kept, total = deltas(tmp_path / "average"), 0.0, 0.0
    for layer, whole in average_of(folders, [1 / 3] * 3).items():
        matrix = whole.flatten(1)
        S = torch.linalg.svdvals(matrix).square()
        lost = (written[layer].flatten(1) - matrix).square().sum()
        assert lost.item() == pytest.approx(S[3:].sum().item(), rel=1e-4)
        assert average.layers[layer] == pytest.approx((S[:3].sum() / S.sum()).item(), rel=1e-5)
        kept, total = kept + S[:3].sum().item(), total + S.sum().item()
    assert average.rank == 3 and average.energy == pytest.approx(kept / total, rel=1e-5)
    assert average.size == (tmp_path / "average" / ADAPTER_FILE).stat().st_size


def test_the_average_is_rounded_once_to_the_dtype_of_the_adapters(tmp_path: Path) -> None:
    options = {"target_modules": ["narrow"], "r": 2, "lora_alpha": 2}
    half = [save_random(tmp_path / f"{i}", i, torch.bfloat16, **options) for i in range(2)]
    average_adapters(half, tmp_path / "half")
    written = load_file(tmp_path / "half" / ADAPTER_FILE)
    sources = [load_file(folder / ADAPTER_FILE) for folder in half]
    for name, value in written.items():
        factor, axis = (0.5, 1) if "lora_B" in name else (1.0, 0)  # a power of two: nothing is rounded
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, torch.cat([source[name] * factor for source in sources], axis))
    mixed = [half[0], save_random(tmp_path / "single", 1, **options)]
    average_adapters(mixed, tmp_path / "mixed")
    assert {v.dtype for v in load_file(tmp_path / "mixed" / ADAPTER_FILE).values()} == {torch.float32}


def test_weights_trained_in_full_are_averaged_too(tmp_path: Path) -> None:
    folders = []
    for i in range(2):
        folders.append(save_random(tmp_path / f"{i}", i, target_modules=["narrow"], modules_to_save=["head"]))
        edit_tensors(folders[-1], lambda tensors, i=i: {k: v + i * v.square() for k, v in tensors.items()})
    average_adapters(folders, tmp_path / "average", weights=[0.25, 0.75])
    a, b, both = (
        PeftModel.from_pretrained(Small(), str(folder)).state_dict()[
            "base_model.model.head.modules_to_save.default.weight"
        ]
        for folder in (*folders, tmp_path / "average")
    )
    assert error(both, 0.25 * a + 0.75 * b) < 1e-6 and error(b, a) > 0.05


def test_one_adapter_can_be_made_smaller(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "one", r=4, lora_alpha=8)
    assert 0 < average_adapters([folder], tmp_path / "small", rank=2).energy < 1


def test_a_llava_with_the_average_is_the_llava_with_merged_weights(tmp_path: Path) -> None:
    """Loaded by peft alone; the weights of the model it is compared with are changed by hand."""
    llava = tiny_llava(tmp_path / "llava")
    folders = []
    for i, (alpha, r) in enumerate([(16, 4), (8, 4), (16, 2), (5, 3)]):
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=r".*language_model.*\.(q_proj|down_proj)", use_rslora=i == 3
        )
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(llava), config)
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
        folders.append(tmp_path / f"{i}")
        model.save_pretrained(str(folders[-1]))
    average_adapters(folders, tmp_path / "average")

    merged = AutoModelForImageTextToText.from_pretrained(llava).eval()
    ids = torch.tensor([[1, 20, 21, 22]])
    base = merged(input_ids=ids).logits
    for folder in folders:
        config = json.loads((folder / CONFIG_FILE).read_text())
        scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
        factors = load_file(folder / ADAPTER_FILE)
        for name, A in factors.items():
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = factors[name.replace("lora_A", "lora_B")]
                merged.get_submodule(layer).weight.data += 0.25 * scaling * B @ A
    loaded = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(llava), str(tmp_path / "average")
    ).eval()
    expected = merged(input_ids=ids).logits
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(base, expected, atol=0.1)


# The program


def test_the_script_writes_the_average_and_says_what_it_kept(tmp_path: Path) -> None:
    folders = save_mixed(tmp_path)
    options = {"adapters": folders, "output_dir": tmp_path / "average", "rank": 3, "weights": [0.2, 0.3, 0.5]}
    running = launch("scripts/average_adapters.py", options, tmp_path / "log")
    assert running.wait() == 0, running.text()
    again = average_adapters(folders, tmp_path / "again", rank=3, weights=[0.2, 0.3, 0.5])
    assert (tmp_path / "average" / ADAPTER_FILE).read_bytes() == again.file.read_bytes()
    for text in ("0.2, 0.3, 0.5 (sum 1)", "rank         3, 4 layers", f"energy kept  {again.energy:.2%}"):
        assert text in running.text()

    edit_config(folders[0], use_dora=True)
    running = launch("scripts/average_adapters.py", options, tmp_path / "error")
    assert running.wait() == 2
    assert running.text().startswith("error: ") and "DoRA" in running.text()
