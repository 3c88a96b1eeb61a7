"""Prompts written by an LLM: its lists read, repetitions left out, nothing requested twice."""

import json
from dataclasses import dataclass, field
from typing import Self

import pytest
import torch
from servers import Scripted, chat
from tiny_vlm import tiny_llava
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_builders.prompts.generate import (
    NEAR,
    Templates,
    generate_prompts,
    prompts_for,
    request_seed,
)
from data_builders.prompts.list_parsing import Distinct, parse_list, words
from data_builders.prompts.llm import EndpointLLM, LocalLLM, Sampling
from data_builders.prompts.reading import given_prompts
from data_builders.self_rewarding import SelfRewardingConfig
from prefopt.errors import InputError
from prefopt.ledger import Ledger
from prefopt.pocket.world import PHRASINGS, caption, train_scenes

TWO = ["elephant, savanna, f/2.8", "elephant at dusk, 1.5 m tall"]


@pytest.mark.parametrize(
    "text",
    [
        "1. {0}\n2. {1}",
        "1) {0}\n2) {1}",
        "(1) {0}\n\n(2) {1}",
        "[1] {0}\n[2] {1}",
        "1: {0}\n2: {1}",
        "- {0}\n- {1}",
        "* {0}\n* {1}",
        "\u2022 {0}\n\u2022{1}",
        "- 1. {0}\n- 2. {1}",
        "{0}\n{1}",
        "{0},\r\n{1},",
        '"{0}"\n"{1}"',
        "1. \u201c{0}\u201d\n2. \u201c{1}\u201d",
        "1. **{0}**\n2. *{1}*",
        "**1.** {0}\n**2.** {1}",
        "**Prompt 1:** {0}\n**Prompt 2:** {1}",
        "Prompt 1: {0}\nPrompt 2: {1}",
        '["{0}", "{1}"]',
        '```json\n[\n  "{0}",\n  "{1}"\n]\n```',
        '{{"prompts": ["{0}", "{1}"]}}',
        '[{{"prompt": "{0}"}}, {{"prompt": "{1}"}}]',
        "Here are 2 prompts:\n\n1. {0}\n2. {1}\n\nLet me know if you need more!",
        "Sure! Here are the prompts you asked for\n{0}\n{1}\nI hope these help.",
        "## Prompts\n- {0}\n- {1}",
        "<think>I need a list:\n1. giraffe\n</think>\n1. {0}\n2. {1}",
    ],
)
def test_lists_are_read_as_they_are_written(text):
    """Numbers inside a prompt stay, and commas do not part it."""
    assert parse_list(text.format(*TWO), 2) == TWO


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I am sorry, but I cannot draw pictures.",
        "The elephant is the largest animal on land. It lives in Africa and in Asia.",
        "Elephants are large.  They eat grass.\n\nThey live in herds. Each has a trunk.",
        "Sure!\nWhich style would you like?",
        "1.\n2.\n---",
    ],
)
def test_a_text_that_is_no_list_has_no_items(text):
    assert parse_list(text, 10) == []


def test_one_line_is_a_list_if_one_was_asked_for():
    assert parse_list("elephant, 35mm photo", 1) == ["elephant, 35mm photo"]
    assert parse_list("1.5 m tall elephant\n2 elephants", 2) == ["1.5 m tall elephant", "2 elephants"]


def test_prompts_are_told_apart_by_their_words():
    same = words("Elephant,  DUSK (f/2.8).")
    assert same == words("elephant dusk \uff46/2.8") != words("elephant dusk f/2.9")
    seen = Distinct(near=0.8)
    prompts = ("a b c d e f g h i", "A, b c d e f g h i!", "i h g f e d c b a", "a b c d e")
    kinds = [seen.add(prompt) for prompt in prompts]
    assert kinds == ["new", "exact", "near", "new"]
    assert seen.add("a b c d e f g h j") == "new", "8 of 10 words are the limit, and not beyond it"
    assert seen.add("a b c d e f g h i k") == "near"


def test_different_scenes_of_the_pocket_are_never_near():
    chosen = [(scene, caption(scene, i % PHRASINGS)) for i, scene in enumerate(train_scenes())]
    seen = Distinct(NEAR)
    assert {seen.add(text) for _, text in chosen} == {"new"} and len(chosen) > 100


@dataclass
class Recited:
    """An LLM that recites what a function of (request, seed) says."""

    say: object
    identity: str = "recited"
    seeds: list[int] = field(default_factory=list)
    loads: int = 0

    def load(self) -> Self:
        self.loads += 1
        return self

    def generate(self, system: str, request: str, *, seed: int) -> str:
        self.seeds.append(seed)
        return self.say(request, seed)


def numbered(items) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(items, start=1))


def herd(request, seed):
    """Eight items: six prompts of an animal, one of them again in capitals, another one nearly."""
    animal = request.split(" of a ")[1].split(",")[0]
    fresh = [f"{animal}, {seed * 31 + i} {seed * 37 + i} {seed * 41 + i} {i}" for i in range(5)]
    long = f"{animal} " + " ".join(str(seed + i) for i in range(20))
    return numbered([*fresh[:3], fresh[0].upper(), long, f"{long} more", *fresh[3:]])


def test_it_is_asked_until_each_class_has_its_prompts():
    llm = Recited(herd)
    written = generate_prompts(llm, ["elephant", "giraffe"], 14, seed=3, held_out_per_class=6)
    for name in ("elephant", "giraffe"):
        training = [record["prompt"] for record in written.training if record["class"] == name]
        held_out = [record["prompt"] for record in written.held_out if record["class"] == name]
        assert (len(training), len(held_out)) == (14, 6) and all(name in prompt for prompt in training)
        seen = Distinct(NEAR)
        assert {seen.add(prompt) for prompt in held_out + training} == {"new"}, "apart also by near ones"
    assert llm.loads == 1
    assert llm.seeds == [request_seed(3, name, k) for name in ("elephant", "giraffe") for k in range(4)]
    counts = {"requested": 80, "calls": 8, "parsed": 64, "exact_duplicates": 8, "near_duplicates": 8}
    assert written.counts == counts
    assert len({record["prompt_id"] for record in written.training + written.held_out}) == 40
    more = generate_prompts(Recited(herd), ["elephant"], 30, seed=3, held_out_per_class=6)
    elephants = [record for record in written.training if record["class"] == "elephant"]
    assert more.training[:14] == elephants and more.held_out == written.held_out[:6]
    assert more.training != generate_prompts(Recited(herd), ["elephant"], 30, seed=4).training


def test_one_text_is_no_prompt_of_two_classes():
    both = "an elephant and a giraffe"
    texts = iter([f"1. {both}, lake\n2. elephant", f"1. {both} lake\n2. giraffe\n3. giraffe, two"])
    written = generate_prompts(Recited(lambda *_: next(texts)), ["elephant", "giraffe"], 2, seed=0)
    prompts = [record["prompt"] for record in written.training]
    assert prompts == [f"{both}, lake", "elephant", "giraffe", "giraffe, two"]
    assert written.counts["exact_duplicates"] == 1


def test_a_prompt_names_its_class():
    """Guards against training on lions as zebras because an LLM lost its thread."""
    listed = "1. a Zebra at dusk\n2. a lion at dusk\n3. zebras, snow\n4. zebrafish"
    written = generate_prompts(Recited(lambda *_: listed), ["zebra"], 2, seed=0)
    assert [record["prompt"] for record in written.training] == ["a Zebra at dusk", "zebras, snow"]
    assert written.counts["without_their_class"] == 2
    with pytest.raises(InputError, match="the LLM lists no prompts of okapi"):
        generate_prompts(Recited(lambda *_: listed), ["okapi"], 2, seed=0)


def test_a_rerun_repeats_no_finished_call(tmp_path):
    first = generate_prompts(Recited(herd), ["elephant"], 9, seed=0, ledger=Ledger(tmp_path, "prompts"))
    silent = Recited(None)
    again = generate_prompts(silent, ["elephant"], 9, seed=0, ledger=Ledger(tmp_path, "prompts"))
    assert again.training == first.training and not silent.seeds
    assert (again.counts["calls"], again.counts["calls_kept"]) == (0, 2)
    further = Recited(herd)
    generate_prompts(further, ["elephant", "zebra"], 13, seed=0, ledger=Ledger(tmp_path, "prompts"))
    assert further.seeds == [request_seed(0, "elephant", 2), *(request_seed(0, "zebra", k) for k in range(3))]
    for change in (
        {"seed": 1},
        {"per_request": 5},
        {"templates": Templates("other", ("Write of a {class}, please",))},
        {"llm": Recited(herd, "another")},
    ):
        asked = {"llm": Recited(herd), "seed": 0} | change
        generate_prompts(classes=["elephant"], per_class=1, ledger=Ledger(tmp_path, "prompts"), **asked)
        assert len(asked["llm"].seeds) == 1, change


def test_a_killed_call_is_asked_again_and_nothing_else(tmp_path):
    def dying(request, seed):
        if seed == request_seed(0, "elephant", 1):
            raise KeyboardInterrupt
        return herd(request, seed)

    with pytest.raises(KeyboardInterrupt):
        generate_prompts(Recited(dying), ["elephant"], 9, seed=0, ledger=Ledger(tmp_path, "prompts"))
    llm = Recited(herd)
    written = generate_prompts(llm, ["elephant"], 9, seed=0, ledger=Ledger(tmp_path, "prompts"))
    assert llm.seeds == [request_seed(0, "elephant", 1)]
    assert written.training == generate_prompts(Recited(herd), ["elephant"], 9, seed=0).training


def test_an_llm_that_never_lists_is_quoted():
    llm = Recited(lambda *_: "Elephants are wonderful.\nThey are big.  They are grey.")
    with pytest.raises(InputError, match=r"no prompts of zebra.*'Elephants are wonderful.*Name another LLM"):
        generate_prompts(llm, ["zebra"], 3, seed=0)
    assert len(llm.seeds) == 5
    with pytest.raises(InputError, match=r"repeats itself: 2 different prompts of zebra of 3 needed"):
        generate_prompts(Recited(lambda *_: "1. zebra\n2. two zebras"), ["zebra"], 3, seed=0)


def test_templates_are_files_and_take_turns(tmp_path):
    for name, text in (("a", "List {count} of {class}.\n"), ("b", "{class}! {count}"), ("c", "animals")):
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").write_text("\n")
    templates = Templates.load(str(tmp_path / "c"), [str(tmp_path / "a"), str(tmp_path / "b")])
    requests = [templates.request(ask, "zebra", 7) for ask in range(3)]
    assert requests == ["List 7 of zebra.", "zebra! 7", "List 7 of zebra."] and templates.system == "animals"
    ours = Templates.load().request(0, "zebra", 7)
    assert "7" in ours and "zebra" in ours and "{" not in ours
    for bad, message in (("c", "has no {class}"), ("empty", "is empty"), ("none", "no template could be")):
        with pytest.raises(InputError, match=message):
            Templates.load(requests=[str(tmp_path / bad)])


SHORT = Sampling(max_new_tokens=24)
ASK = ("You write prompts.", "Write 2 of a zebra.")


def test_a_vlm_s_text_side_writes_by_its_seed(tmp_path):
    folder = tiny_llava(tmp_path)
    llm, same = (LocalLLM(folder, sampling=SHORT) for _ in range(2))
    state = torch.get_rng_state()
    texts = [llm.generate(*ASK, seed=seed) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] == same.generate(*ASK, seed=1) != texts[1] and all(texts)
    assert torch.equal(torch.get_rng_state(), state), "others' draws go on as if nothing was written"
    assert llm.identity == same.identity
    assert llm.identity != LocalLLM(folder, sampling=Sampling(0.6, max_new_tokens=24)).identity
    assert llm.identity != LocalLLM(tiny_llava(tmp_path / "other", seed=1), sampling=SHORT).identity


@pytest.fixture
def causal(tmp_path) -> str:
    """A tiny causal LM whose template, as Mistral's first one, knows no system message."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava(tmp_path / "vlm"))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=160,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return str(tmp_path / "causal")


def test_a_template_without_a_system_role_reads_both_in_one(causal):
    llm = LocalLLM(causal)
    ids = llm._inputs(*ASK)["input_ids"][0]
    read = llm.tokenizer.decode(ids)
    assert read.count("<s>") == 1 and f"[INST] {ASK[0]}\n\n{ASK[1]} [/INST]" in read
    text = llm.generate(*ASK, seed=0)
    assert text and len(ids) + len(llm.tokenizer(text).input_ids) <= 170, "never longer than it can read"
    with pytest.raises(InputError, match="reads no more than 160"):
        llm.generate(ASK[0] * 30, ASK[1], seed=0)


def test_at_temperature_0_there_is_one_answer(causal):
    llm = LocalLLM(causal, sampling=Sampling(0.0, max_new_tokens=12))
    assert llm.generate(*ASK, seed=0) == llm.generate(*ASK, seed=1)


def test_what_is_no_chat_llm_is_named(tmp_path, causal):
    with pytest.raises(InputError, match="no LLM could be loaded from"):
        LocalLLM(str(tmp_path / "none"))
    (tmp_path / "causal" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        LocalLLM(causal)


def test_an_endpoint_writes_and_a_line_cut_short_is_left_out():
    said = [chat("1. a zebra\n2. two zeb", "length"), chat("1. a zebra\n2. two zebras")]
    with Scripted({"/v1/chat/completions": lambda _, number: said[number]}) as server:
        llm = EndpointLLM(server.url, "mistral")
        assert [llm.generate(*ASK, seed=5) for _ in said] == ["1. a zebra", "1. a zebra\n2. two zebras"]
    [body, _] = server.bodies("/v1/chat/completions")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], body["top_p"], body["seed"]) == ("mistral", 0.7, 0.95, 5)
    assert llm.identity == EndpointLLM("http://elsewhere", "mistral").identity


def test_a_build_s_prompts_are_written_and_kept(tmp_path):
    def route(body, _):
        return chat(herd(body["messages"][1]["content"], body["seed"]))

    with Scripted({"/v1/chat/completions": route}) as server:
        config = SelfRewardingConfig(
            classes=["zebra", "lion"],
            prompts_per_class=8,
            held_out_per_class=2,
            writer_url=server.url,
            writer_model_name_or_path="m",
        )
        records = prompts_for(config, tmp_path, 0, "cpu").training
        assert prompts_for(config, tmp_path, 0, "cpu").training == records and len(server.calls) == 4
    assert [record["class"] for record in records] == ["zebra"] * 8 + ["lion"] * 8
    held_out = (tmp_path / "held_out_prompts.txt").read_text().splitlines()
    assert len(held_out) == 4 and not set(held_out) & {record["prompt"] for record in records}
    counts = json.loads((tmp_path / "prompts.json").read_text())["counts"]
    assert counts["calls_kept"] == 4 and counts["parsed"] == 32


def test_given_prompts_take_the_class_they_name():
    records = given_prompts(["two Zebras, dusk", "a lion", "a lion"], ["zebra", "lion"]).training
    assert [(record["prompt"], record["class"]) for record in records] == [
        ("two Zebras, dusk", "zebra"),
        ("a lion", "lion"),
    ]
    for prompts, message in (
        (["a lion and a zebra"], "names zebra and lion of the classes"),
        (["a dandelion"], "names none of the classes"),
        (["a lion"], "no prompt names zebra"),
    ):
        with pytest.raises(InputError, match=message):
            given_prompts(prompts, ["zebra", "lion"])
    for name in ("C++", "Yahoo!", ".NET"):  # which end where no word does
        assert given_prompts([f"a book about {name}, open"], [name]).training[0]["class"] == name
