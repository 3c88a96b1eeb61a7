"""Loading a VLM, and LoRA that stays on its language model."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, tiny_llava
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.reference import adapters_off
from prefopt.vlm.models import ADAPTER_FILE, add_lora, check_saved_adapter, load_vlm, start_from_lora

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["fc1", "q_proj", "linear_1"]])
def test_lora_leaves_vision_tower_and_projector_alone(llava: str, targets: list[str] | None) -> None:
    """Guards against names that also match the CLIP tower, which has a q_proj of its own."""
    model, _ = load_vlm(llava)
    names = adapted(add_lora(model, LoraArguments(lora_target_modules=targets)))
    layers, per_layer = 2, {None: 7, 2: 2, 3: 1}[targets and len(targets)]
    assert len(names) == layers * per_layer * 2  # A and B
    assert all(".language_model." in name for name in names)
    assert not any("vision_tower" in name or "projector" in name or "lm_head" in name for name in names)


def test_only_the_adapter_is_trained(llava: str) -> None:
    model = add_lora(load_vlm(llava)[0], LoraArguments())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapted(model))


def test_saved_adapter_loads_in_peft_and_is_read_back(llava: str, tmp_path: Path) -> None:
    model = add_lora(load_vlm(llava)[0], LoraArguments(lora_r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    check_saved_adapter(model, tmp_path)
    ids = torch.tensor([[1, 20, 21, 22]])
    again = PeftModel.from_pretrained(load_vlm(llava)[0], str(tmp_path))
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)

    save_file(
        {name: value + 1 for name, value in load_file(tmp_path / ADAPTER_FILE).items()},
        tmp_path / ADAPTER_FILE,
    )
    with pytest.raises(RuntimeError, match="28 tensors differ"):
        check_saved_adapter(model, tmp_path)
    save_file({}, tmp_path / ADAPTER_FILE)
    with pytest.raises(RuntimeError, match="no tensors"):
        check_saved_adapter(model, tmp_path)


def test_a_trained_adapter_is_its_own_reference(llava: str, tmp_path: Path) -> None:
    first = add_lora(load_vlm(llava)[0], LoraArguments(lora_r=4))
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    first.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 20, 21, 22]])
    expected = first.eval()(input_ids=ids).logits

    policy = start_from_lora(load_vlm(llava)[0], str(tmp_path)).eval()
    assert torch.equal(policy(input_ids=ids).logits, expected)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert len(trained) == 28
    for parameter in trained:
        parameter.data.zero_()
    assert not torch.equal(policy(input_ids=ids).logits, expected)
    with adapters_off(policy):
        assert torch.equal(policy(input_ids=ids).logits, expected)


def test_unusable_models_and_adapters_are_named(llava: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere/at-all"):
        load_vlm("./nowhere/at-all")
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    shutil.copytree(llava, tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="no vision-language model"):
        load_vlm(str(tmp_path / "text"))
    with pytest.raises(InputError, match="nothing_like_it"):
        add_lora(load_vlm(llava)[0], LoraArguments(lora_target_modules=["nothing_like_it"]))
    shutil.copytree(llava, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template"):
        load_vlm(str(tmp_path / "mute"))

    with pytest.raises(InputError, match=r"no adapter './nowhere'"):
        start_from_lora(load_vlm(llava)[0], "./nowhere")
    with pytest.raises(InputError, match=r"no adapter_config.json"):
        start_from_lora(load_vlm(llava)[0], llava)


def test_an_adapter_of_another_model_is_an_input_error(llava: str, tmp_path: Path) -> None:
    add_lora(load_vlm(llava)[0], LoraArguments()).save_pretrained(tmp_path)
    written = load_file(tmp_path / ADAPTER_FILE)
    save_file(
        {name.replace("layers.1", "layers.7"): value for name, value in written.items()},
        tmp_path / ADAPTER_FILE,
    )
    with pytest.raises(InputError, match="does not fit"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path))
    save_file({name: value[:, :3].contiguous() for name, value in written.items()}, tmp_path / ADAPTER_FILE)
    with pytest.raises(InputError, match="does not fit"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path))
