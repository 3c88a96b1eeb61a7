"""The self-critique builder with tiny LLaVAs: answers, comparisons, adapters, launched as a user does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builds import build_of, calls, contents, kept, kill_at, table, texts_of
from launching import launch, torchrun
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, picture, tiny_judge, vision_pairs

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.criticism import critic_of
from data_builders.answers.generation import generator_of
from data_builders.self_critique import main
from prefopt.errors import InputError
from prefopt.judges.critic import BETTER
from prefopt.judges.critic_cases import PairCase
from prefopt.judges.loading import load_critic, load_judge
from prefopt.judges.questions import Case, Question
from prefopt.vlm.examples import read_vision_examples
from prefopt.vlm.generate import Request, generate
from prefopt.vlm.models import load_vlm

CPU = torch.device("cpu")


def tiny_critic(folder):
    """A random model of which the next token is A or B nearly always."""
    tiny_judge(folder, seed=1)
    tokenizer = load_vlm(str(folder))[1].tokenizer
    tensors = load_file(folder / "model.safetensors")
    [name] = [name for name in tensors if "lm_head" in name]
    head, (a, b) = tensors[name], tokenizer.convert_tokens_to_ids(["A", "B"])
    direction = 8 * head[a].clone()
    head.zero_()
    head[a], head[b] = direction, -direction
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_adapter(model, folder):
    """A random adapter of a model, saved as peft does."""
    options = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision_tower.*"}
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    torch.manual_seed(1)
    get_peft_model(load_vlm(str(model))[0], config).save_pretrained(str(folder))


def tiny_speaker(folder):
    """A random model that ends its answers soon: many tokens end one."""
    tiny_judge(folder)
    file = folder / "generation_config.json"
    options = json.loads(file.read_text())
    file.write_text(json.dumps({**options, "eos_token_id": [options["eos_token_id"], *range(10, 60)]}))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a table of prompts."""
    folder = tmp_path_factory.mktemp("self_critique")
    (folder / "rows").mkdir()
    vision_pairs(8).to_parquet(folder / "rows" / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def llavas(workplace):
    """Options of a build by two tiny models; the dataset is in `llava`."""
    for name, make in (("speaker", tiny_speaker), ("critic", tiny_critic)):
        (workplace / name).mkdir()
        make(workplace / name)
    options = {
        "dataset_name": str(workplace / "rows"),
        "model_name_or_path": str(workplace / "speaker"),
        "critic_name_or_path": str(workplace / "critic"),
        "max_new_tokens": 40,
        "margin": 0.0,
        "batch_size": 2,
        "block_size": 4,
        "critic_batch_size": 2,
    }
    main(SelfCritiqueConfig(**options, output_dir=str(workplace / "llava")))
    return options


def test_a_llava_answers_as_its_seed_says_and_compares_each_pair_on_one_image(llavas, workplace):
    rows, pairs = table(workplace / "llava", "candidates"), table(workplace / "llava", "pairs")
    examples = read_vision_examples(llavas["dataset_name"], "sft")
    model, processor = load_vlm(llavas["model_name_or_path"])
    for row in rows[4:8:2]:
        example = examples[examples.items.index(row["item"]), 0]
        request = Request(example["images"], example["prompt"], row["prompt_id"])
        sampling = {"max_new_tokens": row["max_new_tokens"], "seed": row["seed"], "answers": 2}
        [both] = generate(model.eval(), processor, [request], **sampling)
        said = [other["answer"] for other in rows if other["prompt_id"] == row["prompt_id"]]
        assert [answer.text for answer in both] == said
    critic = load_critic(llavas["critic_name_or_path"], typed=True)
    encoded, tower = [], critic.judge.answerer.model.model.vision_tower
    hook = tower.register_forward_hook(lambda *call: encoded.append(len(call[2].last_hidden_state)))
    for pair in pairs:
        question = pair["prompt"][0]["content"][-1]["text"]
        case = PairCase([picture(pair["item"])], question, *texts_of(pair))
        assert critic.compare([case])[0].p_first == pytest.approx(pair["p_chosen"], abs=1e-5)
    hook.remove()
    assert pairs and encoded == [1] * len(pairs)  # both orders read the image once


def test_launched_with_a_llava_killed_and_launched_again(llavas, workplace, tmp_path):
    script, folder = "data_builders/self_critique.py", workplace / "llava-killed"
    options = llavas | {"output_dir": str(folder)}
    kill_at(6, main, SelfCritiqueConfig(**options))
    compared = len(kept(folder, "comparisons"))
    assert len(kept(folder, "answers")) == 16 and compared
    again = launch(script, options, tmp_path / "again")
    assert again.wait() == 0, again.text()
    assert contents(folder) == contents(workplace / "llava")
    figures = build_of(folder)["figures"]
    assert figures["pairs"] > 0 and calls(workplace / "llava")[0] == 8
    assert calls(folder) == [0, 2 * (figures["compared"] + figures["unreadable"] - compared)]
    assert f"model calls of this run: 0 answering, {calls(folder)[1]} comparing" in again.text()


@pytest.mark.slow
def test_two_processes_build_the_same(llavas, workplace):
    torchrun("data_builders/self_critique.py", llavas | {"output_dir": workplace / "two"})
    assert build_of(workplace / "two")["run"]["processes"] == 2
    assert contents(workplace / "two") == contents(workplace / "llava")


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
def test_by_default_the_model_judges_itself_with_its_adapter(llavas, workplace, tmp_path):
    """Another adapter is another generator and another critic; another seed, another generator alone."""
    model, adapter = llavas["model_name_or_path"], tmp_path / "adapter"
    save_adapter(model, adapter)
    fixed = {"dataset_name": llavas["dataset_name"], "model_name_or_path": model}
    changes = [{}, {"adapter": str(adapter)}, {"seed": 1}, {"critic_adapter": str(adapter)}]
    configs = [SelfCritiqueConfig(**fixed, **change) for change in changes]
    generators = [generator_of(config, CPU).identity for config in configs]
    critics = [critic_of(config, CPU).identity for config in configs]
    assert len(set(generators)) == 3 and generators[0] == generators[3]
    assert len(set(critics)) == 2 and critics[1] == critics[3] != critics[0] == critics[2]
    assert configs[1].critic == (model, None, str(adapter))
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert generator_of(configs[1], CPU).identity != generators[1]
    assert critic_of(configs[1], CPU).identity != critics[1]


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
def test_an_adapter_answers_and_judges_as_the_model_that_it_was_merged_into(llavas, tmp_path):
    model, adapter, merged = llavas["model_name_or_path"], str(tmp_path / "adapter"), str(tmp_path / "merged")
    save_adapter(model, adapter)
    loaded, processor = load_vlm(model)
    PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(merged)
    processor.save_pretrained(merged)
    shutil.copy(Path(model, "generation_config.json"), merged)
    case = Case(picture(0), "a zebra", (Question("animal", "Can a zebra be seen?"), BETTER))
    plain, adapted, whole = (
        [answer.probabilities for answer in load_judge(name, **options).answer([case])[0]]
        for name, options in ((model, {}), (model, {"adapter": adapter}), (merged, {}))
    )
    for ours, expected, without in zip(adapted, whole, plain, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5) and ours != pytest.approx(without, abs=1e-3)
    request = Request([picture(0)], [{"role": "user", "content": [{"type": "image"}]}], "x")
    plain, adapted, whole = (
        generator_of(
            SelfCritiqueConfig(dataset_name="x", model_name_or_path=name, adapter=lora, answers=4), CPU
        )
        .load()
        .generate([request])
        for name, lora in ((model, None), (model, adapter), (merged, None))
    )
    assert adapted == whole != plain


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
def test_an_adapter_goes_to_no_server_and_to_no_writer(llavas, tmp_path):
    options = {"adapter": str(tmp_path)}
    with pytest.raises(InputError, match=r"not for m behind http://localhost:1; leave it out"):
        load_critic("m", url="http://localhost:1", typed=True, **options)
    with pytest.raises(InputError, match=r"not for .*speaker, which writes; leave it out"):
        load_critic(llavas["model_name_or_path"], **options)
