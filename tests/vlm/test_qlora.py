"""QLoRA: what is in 4 bits and what is not, training on it, saving, caching, and what is refused.

Guards: a vision tower in 4 bits, a base model cast to float32 as a whole, LoRA weights in half precision.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import running
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from running import logged
from tiny_vlm import FAMILIES, PEFT_ON_TRANSFORMERS_5, tiny_judge, tiny_vlm, vision_pairs
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.reference import adapters_off, cache_reference
from prefopt.store import tensors_key
from prefopt.vlm.models import ADAPTER_FILE, add_lora, load_vlm, start_from_lora

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

LN2 = math.log(2)
IDS = torch.tensor([[1, 20, 21, 22, 23]])
BESIDE = (
    "vision_tower",
    "visual",
    "vision_model",
    "projector",
    "connector",
    "lm_head",
    "embed_tokens",
    "norm",
)
train = partial(running.train, name="vlm_dpo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: tiny_vlm(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Options of a run on four pairs, all of them in each step."""
    folder = tmp_path_factory.mktemp("setting")
    vision_pairs(4).save_to_disk(folder / "pairs")
    return lambda model: {
        "model_name_or_path": model,
        "dataset_name": str(folder / "pairs"),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 3e-3,
        "disable_tqdm": True,
        "load_in_4bit": True,
    }


def nf4(dtype: torch.dtype = torch.float32, **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        **{
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            **options,
        },
    )


def load(folder: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_vlm(folder, dtype=dtype, quantization=nf4(dtype))[0]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def inside(model: PreTrainedModel) -> str:
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder) + "."


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def with_noise(model: PeftModel) -> PeftModel:
    """The model with second factors that are not zero, as after training."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_is_in_4_bits(folders: dict, family: str, dtype: torch.dtype) -> None:
    """Guards: transformers' default skips lm_head alone and quantises the vision tower."""
    model = load(folders[family], dtype)
    plain, _ = load_vlm(folders[family], dtype=dtype)
    assert list(linears(model)) == list(linears(plain))
    for name, layer in linears(model).items():
        assert isinstance(layer, Linear4bit) == name.startswith(inside(model)), name
        if isinstance(layer, Linear4bit):
            assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("nf4", True)
            assert layer.weight.quant_state.nested
            assert (layer.weight.dtype, layer.compute_dtype) == (torch.uint8, dtype)
    quantised = {name for name, layer in linears(model).items() if isinstance(layer, Linear4bit)}
    assert len(quantised) == 7 * model.config.get_text_config().num_hidden_layers
    others = {
        name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in quantised
    }
    assert {p.dtype for p in others.values()} == {dtype}
    expected = dict(plain.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in others.items())
    assert sum(any(part in name for part in BESIDE) for name in others) > 20


def test_4_bit_weights_are_near_the_weights(folders: dict) -> None:
    """Neighbouring codes of NF4 lie up to 0.304 of a block's largest value apart (arXiv 2305.14314)."""
    model, (plain, _) = load(folders["llava"]), load_vlm(folders["llava"])
    for name, layer in linears(model).items():
        if isinstance(layer, Linear4bit):
            weight = linears(plain)[name].weight.detach()
            stored = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            error = (stored - weight).abs().reshape(-1, 64)
            largest = weight.abs().reshape(-1, 64).amax(1, keepdim=True)
            assert 0.1 < (error / largest).max() < 0.16  # half of it, and 1 % for the nested constants


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_float32_and_the_language_models_alone(folders: dict, family: str, dtype, tmp_path) -> None:
    model = with_noise(add_lora(load(folders[family], dtype), LoraArguments(lora_r=4)))
    model.save_pretrained(tmp_path)
    again = start_from_lora(load(folders[family], dtype), str(tmp_path))
    for policy in (model, again):
        adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name}
        assert {p.dtype for p in adapters.values()} == {torch.float32}
        assert all(
            name.startswith(f"base_model.model.{inside(policy.get_base_model())}layers.") for name in adapters
        )
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert trained == {name for name in adapters if ".default." in name}
        base = [p for name, p in policy.named_parameters() if "lora_" not in name]
        assert {p.dtype for p in base} == {torch.uint8, dtype}
    assert torch.equal(logits(model), logits(again))
    with adapters_off(model) as base, adapters_off(again) as reference:
        assert torch.equal(logits(again), logits(reference))
        assert not torch.equal(logits(base), logits(reference))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl", "smolvlm"])
def test_qlora_trains_and_its_adapter_loads_in_peft(
    folders: dict, setting: Callable, family: str, tmp_path: Path
) -> None:
    trainer = train(setting(folders[family]), tmp_path)
    losses = logged(tmp_path)
    assert losses[0] == pytest.approx(LN2, abs=1e-6)
    assert losses[0] > losses[1] > losses[2]
    assert (tmp_path / ADAPTER_FILE).is_file()
    base = load(folders[family])
    untrained = logits(base)
    again = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(logits(again), logits(trainer.model))
    with adapters_off(trainer.model) as reference:
        assert torch.equal(logits(reference), untrained)


@pytest.mark.parametrize(
    ("options", "compute", "rest"),
    [
        ({}, torch.float32, torch.float32),
        ({"bf16": True}, torch.bfloat16, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True, "dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False}, torch.float32, torch.float32),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_option_runs(
    folders: dict, setting: Callable, options: dict, compute, rest, tmp_path: Path
) -> None:
    model = train(setting(folders["llava"]), tmp_path, max_steps=2, **options).model.get_base_model()
    assert logged(tmp_path)[0] == pytest.approx(LN2, abs=1e-6)
    assert logged(tmp_path)[1] < LN2
    layer = model.model.language_model.layers[0].self_attn.q_proj.base_layer
    assert layer.compute_dtype == compute
    assert layer.weight.quant_type == options.get("bnb_4bit_quant_type", "nf4")
    assert layer.weight.quant_state.nested == options.get("use_bnb_nested_quant", True)
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {rest}
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {rest}
    assert model.lm_head.weight.dtype == rest


# A frozen tower has no gradient to recompute.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_activation_checkpointing_changes_no_loss(folders: dict, setting: Callable, tmp_path: Path) -> None:
    options = setting(folders["llava"]) | {"max_steps": 2}
    train(options, tmp_path / "plain")
    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        run = tmp_path / str(reentrant)
        train(options, run, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
        assert logged(run) == pytest.approx(logged(tmp_path / "plain"), abs=1e-6)


def test_training_goes_on_from_an_adapter_and_from_a_checkpoint(folders, setting, tmp_path: Path) -> None:
    options = setting(folders["llava"])
    every_step = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    train(options, tmp_path / "whole", **every_step)
    train(
        options,
        tmp_path / "resumed",
        **every_step,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )
    whole, resumed = ((tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    train(options, tmp_path / "second", adapter_name_or_path=str(tmp_path / "whole"))
    assert logged(tmp_path / "second")[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_a_forward_pass_changes_neither_weights_nor_gradients(
    folders: dict, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards bitsandbytes 0.50 on a CPU with AVX512-BF16: a layer's first forward without gradient repacked
    its weights, rounded their constants to bfloat16, and let no gradient pass from then on."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, _ = load_vlm(folders[family], quantization=nf4(torch.bfloat16))
    inputs = model.get_input_embeddings()(IDS)

    def gradient() -> Tensor:
        embedded = inputs.detach().requires_grad_()
        model.train()(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    weights, before = tensors_key(model.state_dict()), gradient()
    logits(model)
    assert tensors_key(model.state_dict()) == weights
    assert torch.equal(gradient(), before)


class Examples:
    """Four examples for the reference cache, which says what scores depend on."""

    identity = {"examples": "four"}  # noqa: RUF012

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        return {"item": index_and_visit[0]}


def test_reference_scores_of_4_bit_weights_are_their_own(folders: dict, tmp_path: Path) -> None:
    calls = []

    def score(batch: Any) -> Tensor:
        calls.append(batch)
        return batch["item"][:, None].repeat(1, 2).float()

    def cached(model: PreTrainedModel) -> None:
        policy = add_lora(model, LoraArguments())
        options: Any = {"folder": tmp_path, "visits": 1, "precision": "fp32", "loader": {}, "batch_size": 4}
        found = cache_reference(Examples(), policy, score, **options)
        assert found[3, 0]["reference"].tolist() == [3, 3]

    cached(load(folders["llava_onevision"]))
    cached(load(folders["llava_onevision"]))
    assert len(calls) == 1
    others = (
        load_vlm(folders["llava_onevision"])[0],
        load_vlm(folders["llava_onevision"], quantization=nf4(bnb_4bit_quant_type="fp4"))[0],
        load_vlm(folders["llava_onevision"], quantization=nf4(bnb_4bit_use_double_quant=False))[0],
        load(folders["llava_onevision"], torch.bfloat16),
    )
    for number, other in enumerate(others, start=2):
        cached(other)
        assert len(calls) == number, "computed for this one, and kept beside the others"
    cached(load(folders["llava_onevision"]))
    assert len(calls) == 5 == len(list(tmp_path.iterdir()))


def test_weights_in_4_bits_on_disk_are_loaded_as_they_are(folders, setting, tmp_path: Path) -> None:
    model = load(folders["llava"])
    folder = tmp_path / "model"
    shutil.copytree(folders["llava"], folder)
    model.save_pretrained(folder)
    again, _ = load_vlm(str(folder))
    assert tensors_key(again.state_dict()) == tensors_key(model.state_dict())
    assert torch.equal(logits(again), logits(model))

    options = setting(str(folder))
    with pytest.raises(InputError, match=r"is quantised already \(bitsandbytes\); leave out --load_in_4bit"):
        train(options, tmp_path / "twice")
    options["load_in_4bit"] = False
    with pytest.raises(InputError, match=r"are quantised \(bitsandbytes\): leave out --no_use_peft"):
        train(options, tmp_path / "whole", use_peft=False)
    train(options, tmp_path / "run")
    train(setting(folders["llava"]), tmp_path / "expected")
    assert logged(tmp_path / "run") == logged(tmp_path / "expected")


def test_other_quantised_weights_are_refused_with_the_reason(folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llava"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no vision-language model could be loaded .*GPTQ"):
        load_vlm(str(folder))
    with pytest.raises(InputError, match=r"is quantised already \(gptq\)"):
        load(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_peft": False}, "--load_in_4bit is for frozen weights; leave out --no_use_peft"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, "are for --load_in_4bit; add it"),
        ({"load_in_4bit": False, "use_bnb_nested_quant": False}, "are for --load_in_4bit; add it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_are_named(folders, setting, options, message, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(setting(folders["llava"]), tmp_path, **options)


def test_layers_that_a_cpu_reads_wrongly_are_named(tmp_path: Path) -> None:
    """Guards bitsandbytes 0.50: blocks of 64 weights that reach over a row's end got other constants."""
    folder = tiny_judge(tmp_path)
    with pytest.raises(InputError, match=r"multiple of 64 inputs, and model\.language_model\..* has 32"):
        load(folder)


def test_missing_bitsandbytes_is_named(folders, setting, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r'pip install "prefopt\[bitsandbytes\]"'):
        train(setting(folders["llava"]), tmp_path)


def test_by_default_transformers_quantises_the_vision_tower(folders: dict) -> None:
    """The fault that the skipped modules are for; when this fails, they are no longer needed."""
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"], quantization_config=nf4())
    assert any(isinstance(module, Linear4bit) for module in model.model.vision_tower.modules())
