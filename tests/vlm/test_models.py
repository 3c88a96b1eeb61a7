"""Loading a VLM of each family, LoRA that stays on its language model, and adapters of other models."""

import json
import shutil
from pathlib import Path

import pytest
import running
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlm import FAMILIES, PEFT_ON_TRANSFORMERS_5, picture, tiny_judge, tiny_llava, vision_pairs
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt.adapters import apply_options
from prefopt.config import LoraArguments
from prefopt.errors import InputError
from prefopt.reference import adapters_off
from prefopt.vlm.models import (
    ADAPTER_FILE,
    add_lora,
    check_saved_adapter,
    language_model_name,
    load_vlm,
    start_from_lora,
)

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: tiny_judge(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def trained(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with an adapter whose factors are not zero, saved to a folder."""
    policy = add_lora(model, LoraArguments(lora_r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    policy.save_pretrained(folder)
    return policy.eval()


def test_another_alpha_leaves_an_adapters_answers_as_they_are(llava: str, tmp_path: Path) -> None:
    trained(load_vlm(llava)[0], tmp_path)
    policy = start_from_lora(load_vlm(llava)[0], str(tmp_path)).eval()
    ids = torch.arange(4, 9)[None]
    before = policy(input_ids=ids).logits
    apply_options(LoraArguments(adapter_name_or_path=str(tmp_path), lora_alpha=64), policy)
    assert policy.peft_config["default"].lora_alpha == policy.peft_config["reference"].lora_alpha == 64
    torch.testing.assert_close(policy(input_ids=ids).logits, before)
    with adapters_off(policy):
        torch.testing.assert_close(policy(input_ids=ids).logits, before)
    with pytest.raises(InputError, match=r"--lora_dropout is 0.5, and the adapter .* has 0.0"):
        apply_options(LoraArguments(adapter_name_or_path=str(tmp_path), lora_dropout=0.5), policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_the_language_model_of_each_family(folders: dict, family: str, tmp_path: Path) -> None:
    """Guards against names that also match a layer of the vision tower, and of Qwen3-VL's deepstack."""
    model, processor = load_vlm(folders[family])
    name = language_model_name(model)
    assert name == {"idefics3": "model.text_model", "smolvlm": "model.text_model"}.get(
        family, "model.language_model"
    )
    assert model.get_submodule(name).config.model_type == model.config.get_text_config().model_type
    assert processor.chat_template is not None
    text = f"<s>{processor.image_token} What animal is it?"
    inputs = processor(text=[text], images=[[picture(1)]], add_special_tokens=False, return_tensors="pt")
    base = model.eval()(**inputs).logits

    policy = trained(model, tmp_path)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(adapted(policy)) == layers * 7 * 2  # A and B
    assert all(one.startswith(f"base_model.model.{name}.layers.") for one in adapted(policy))
    beside = ("vision", "visual", "projector", "merger", "connector", "lm_head")
    assert not any(part in one for one in adapted(policy) for part in beside)
    expected = policy(**inputs).logits
    assert not torch.equal(expected, base)

    again = start_from_lora(load_vlm(folders[family])[0], str(tmp_path)).eval()
    assert torch.equal(again(**inputs).logits, expected)
    with adapters_off(again):
        assert torch.equal(again(**inputs).logits, expected)


def test_a_language_model_that_holds_the_vision_tower_is_refused(llava: str, monkeypatch) -> None:
    """transformers hands over the whole body where it knows no name of the language model."""
    model, _ = load_vlm(llava)
    monkeypatch.setattr(type(model), "get_decoder", lambda model: model.model)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration does not tell its language model"):
        add_lora(model, LoraArguments())


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


def test_an_adapter_of_other_shapes_says_which(llava: str, tmp_path: Path) -> None:
    wider = tiny_judge(tmp_path / "wider", hidden_size=64)
    trained(load_vlm(wider)[0], tmp_path / "adapter")
    model, _ = load_vlm(llava)
    with pytest.raises(InputError, match=r"does not fit .*: it was trained on .*wider.*base_model_name_or"):
        start_from_lora(model, str(tmp_path / "adapter"))
    rename_base(tmp_path / "adapter", llava)
    with pytest.raises(InputError, match=r"does not fit .*: .*size mismatch for .*lora_A.*\[4, 64\]"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path / "adapter"))


def rename_base(adapter: Path, base: str) -> None:
    """Change what an adapter says it was trained on."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_an_adapter_of_another_base_is_refused_unless_it_can_be_the_same(llava: str, tmp_path: Path) -> None:
    """Guards: an adapter on a model of the same shapes, whose weights are other ones."""
    other = tiny_llava(tmp_path / "other" / "model", seed=1)
    trained(load_vlm(other)[0], tmp_path / "adapter")
    with pytest.raises(InputError, match=r"trained on .*/other/model\. Name that model; or"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path / "adapter"))
    for moved in ("/gone/" + Path(llava).name, "somebody/" + Path(llava).name):
        rename_base(tmp_path / "adapter", moved)
        start_from_lora(load_vlm(llava)[0], str(tmp_path / "adapter"))
    rename_base(tmp_path / "adapter", "somebody/another-model")
    with pytest.raises(InputError, match="trained on somebody/another-model"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json is no JSON"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path / "adapter"))


def test_an_adapter_on_the_vision_tower_is_refused(llava: str, tmp_path: Path) -> None:
    everywhere = get_peft_model(load_vlm(llava)[0], LoraConfig(r=4, target_modules=["q_proj"]))
    everywhere.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has 2 layers outside of the language model, model\.vision_tower"):
        start_from_lora(load_vlm(llava)[0], str(tmp_path))


def test_a_run_that_saved_no_tensors_fails(llava: str, tmp_path: Path, monkeypatch) -> None:
    """Guards: adapters saved as empty files, which nobody noticed until they were averaged."""
    vision_pairs(2).save_to_disk(tmp_path / "pairs")

    def save_nothing(model: PeftModel, folder: Path, **_) -> None:
        save_file({}, Path(folder) / ADAPTER_FILE)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_nothing)
    options = {"model_name_or_path": llava, "dataset_name": str(tmp_path / "pairs"), "max_steps": 1}
    with pytest.raises(RuntimeError, match="the file holds no tensors"):
        running.train(options, tmp_path / "run", "vlm_dpo", save_strategy="no")
