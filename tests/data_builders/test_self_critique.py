"""The self-critique builder: what it keeps, repeats and writes; generator and judge are mostly stand-ins."""

import hashlib
import html
import json
import re
from itertools import combinations
from math import exp

import pytest
from browser import after
from builds import (
    build_of,
    calls,
    check_is_a_dataset,
    contents,
    forget,
    header_of,
    kept,
    kill_at,
    table,
    texts_of,
    values,
)
from datasets import Dataset, load_dataset
from servers import Scripted, chat
from tiny_vlm import IMAGE_TOKENS, picture, tiny_judge, vision_pairs
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.selection import REASONS
from data_builders.self_critique import main
from prefopt.errors import InputError
from prefopt.judges.critic import TypedCritic
from prefopt.judges.questions import Answer
from prefopt.loading import Lazy
from prefopt.vlm.examples import read_vision_examples
from prefopt.vlm.generate import Generated
from prefopt.vlm.models import load_vlm

ROWS, DUPLICATES, WITHOUT_IMAGE = 30, 2, 1
SCRIPT = "<script>alert(1)</script> & co: what is it?"
SAID = [
    "A zebra.",
    "A red zebra, seen from afar.",
    "Two elephants.",
    "It is grey.",
    "Nothing at all, I think, but snow.",
    "<b>A giraffe</b>",
    "",
    "No.",
    "Three zebras in the snow.",
    "A blue one.",
    "I see a giraffe and, behind it, two more.",
    "It is raining.",
    "Grass.",
    "An elephant, which is red.",
]


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4])


class Parrot:
    """A generator that says one of a few sentences, a function of item and number."""

    identity = "parrot"

    def __init__(self, answers=2):
        self.answers = answers

    def generate(self, requests):
        return [[self.one(request.item, number) for number in range(self.answers)] for request in requests]

    @staticmethod
    def one(item, number):
        chance = digest(item, number)
        text = SAID[chance % len(SAID)]
        return Generated(text, 1 + len(text.split()), chance % 13 != 0)


class Opinion:
    """A judge with an opinion of each answer, a liking for the first place, and nothing to say of some."""

    identity = "opinion"
    bias = 0.7

    def answer(self, cases):
        return [[self.one(case.prompt)] for case in cases]

    @classmethod
    def one(cls, prompt):
        question, rest = prompt.split("The first answer: ")
        first, second = rest.split("\n\nThe second answer: ")
        p = 1 / (1 + exp(-(cls.worth(first) - cls.worth(second) + cls.bias)))
        unread = digest(sorted([first, second]), question) % 9 == 0
        return Answer({"the first answer": p, "the second answer": 1 - p}, 0.9 if unread else 0.01)

    @staticmethod
    def worth(answer):
        return 4 * digest(answer) / 2**32


@pytest.fixture(scope="module", autouse=True)
def no_collecting():
    """Of models like these there is nothing to free, and Python would look through all libraries for it."""
    patch = pytest.MonkeyPatch()
    patch.setattr("data_builders.engine.passes.free_memory", lambda: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a table of prompts: some are there twice, one has no image, one has HTML."""
    folder = tmp_path_factory.mktemp("self_critique")
    table = vision_pairs(ROWS)
    rows = [table[place] for place in [*range(ROWS), *range(DUPLICATES), 0]]
    rows[-1]["images"] = []
    rows[2]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SCRIPT}]
    (folder / "rows").mkdir()
    Dataset.from_list(rows, features=table.features).to_parquet(folder / "rows" / "train.parquet")
    return folder


def settings(workplace, name, **changes):
    options = {
        "dataset_name": str(workplace / "rows"),
        "batch_size": 3,
        "block_size": 7,
        "critic_batch_size": 4,
        "gallery": False,
        "output_dir": str(workplace / name),
    }
    return SelfCritiqueConfig(**options | changes)


def build(config, generator=Parrot, judge=Opinion):
    """Build with these in place of real models."""
    main(
        config,
        Lazy(generator.identity, lambda: generator(config.answers)),
        Lazy(judge.identity, lambda: TypedCritic(judge())),
    )


@pytest.fixture(scope="module")
def whole(workplace):
    build(settings(workplace, "whole", gallery=True))
    return workplace / "whole"


def expected_p(row, first, second):
    """How likely the first answer is the better one: both orders asked anew, their log-odds averaged."""
    question = "\n\n".join(
        block["text"] for message in row["prompt"] for block in message["content"] if block["text"]
    )
    words = "an image, a question about it, and two answers.\n\nQuestion: {}\n\nThe first answer: {}"
    words += "\n\nThe second answer: {}"
    answers = [Opinion.one(words.format(question, *pair)) for pair in ((first, second), (second, first))]
    if any(answer.other_mass > 0.5 for answer in answers):
        return None
    straight, swapped = (answer.probabilities["the first answer"] for answer in answers)
    return 1 / (1 + (swapped / (1 - swapped) * (1 - straight) / straight) ** 0.5)


def test_a_build_is_a_dataset_of_the_hub(whole, tmp_path):
    check_is_a_dataset(whole, tmp_path / "copy", "pairs")
    assert header_of(whole)["task_categories"] == ["visual-question-answering", "image-text-to-text"]
    card = (whole / "README.md").read_text()
    assert "## What the critic was asked\n\n```\n" in card and "{first}" in card and "{question}" in card


def test_every_answer_is_in_the_table_with_its_comparison_or_its_reason(whole):
    rows = table(whole, "candidates")
    assert len(rows) == 2 * ROWS
    reasons = set()
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert (one["candidate"], other["candidate"]) == (0, 1) and one["prompt_id"] == other["prompt_id"]
        both = [Parrot.one(row["prompt_id"], row["candidate"]) for row in (one, other)]
        for row, said in zip((one, other), both, strict=True):
            assert (row["answer"], row["tokens"], row["finished"]) == (said.text, said.tokens, said.finished)
            flawed = "unfinished answer" if not said.finished else "empty answer" if not said.text else ""
            assert row["invalid_reason"] in (flawed, flawed or "critic unreadable")
            assert [bool(row["invalid_reason"]), bool(row["not_selected_reason"]), row["selected"]].count(
                True
            ) == 1
            reasons |= {row["invalid_reason"], row["not_selected_reason"]}
        valid = [said for said in both if said.finished and said.text]
        if len({said.text for said in valid}) < 2:
            reason = {1: "no second answer", 2: "identical answers"}
            assert {row["not_selected_reason"] for row in (one, other)} <= {"", reason.get(len(valid))}
            assert not one["compared_with"] and not one["selected"]
            continue
        p = expected_p(one, one["answer"], other["answer"])
        if p is None:
            assert one["invalid_reason"] == other["invalid_reason"] == "critic unreadable"
            continue
        assert one["p_better"] == [pytest.approx(p)] and other["p_better"] == [pytest.approx(1 - p)]
        assert one["selected"] == other["selected"] == (abs(p - 0.5) >= 0.1)
        assert one["not_selected_reason"] == ("" if one["selected"] else "abstained")
    assert reasons == {
        "",
        "unfinished answer",
        "empty answer",
        "critic unreadable",
        "identical answers",
        "no second answer",
        "abstained",
    }


def test_the_pairs_are_read_as_they_were_written(whole, workplace):
    rows = table(whole, "pairs")
    assert len(rows) > 4
    source = table(workplace, "rows")
    for row in rows:
        texts = texts_of(row)
        assert row["p_chosen"] == pytest.approx(expected_p(row, *texts)) and row["p_chosen"] >= 0.6
        assert row["margin"] == pytest.approx(row["p_chosen"] - 0.5)
        assert [image["bytes"] for image in row["images"]] == [
            image["bytes"] for image in source[row["item"]]["images"]
        ]
        said = [
            Parrot.one(row["prompt_id"], row[f"{side}_candidate"]).text for side in ("chosen", "rejected")
        ]
        assert texts == said
        assert [row["chosen_tokens"], row["rejected_tokens"]] == [1 + len(text.split()) for text in texts]
    examples = read_vision_examples(str(whole), "pairs", config="pairs")
    assert len(examples) == len(rows) and examples.soft_labels
    example = examples[0, 0]
    assert example["p_chosen"] == rows[0]["p_chosen"]
    assert example["images"][0].tobytes() == picture(rows[0]["item"]).tobytes()
    assert [block["type"] for block in example["prompt"][-1]["content"]] == ["image", "text"]


def test_the_pairs_are_trl_s(whole, tmp_path):
    """trl's own collator reads them: the images in their places, the answers as completions."""
    processor = load_vlm(tiny_judge(tmp_path))[1]
    rows = load_dataset(str(whole), "pairs", split="train")
    batch = DataCollatorForVisionPreference(processor)([rows[0], rows[1]])
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [IMAGE_TOKENS] * 4
    text = processor.tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
    assert rows[0]["chosen"][0]["content"][0]["text"] in text


def test_a_build_says_what_became_of_every_prompt(whole, capsys, workplace):
    build(settings(workplace, "whole", gallery=True))
    said = capsys.readouterr().out
    figures, dropped = build_of(whole)["figures"], build_of(whole)["dropped"]
    assert figures["prompts"] == ROWS + DUPLICATES + WITHOUT_IMAGE
    assert figures["pairs"] + sum(dropped["prompts"].values()) == figures["prompts"]
    assert dropped["prompts"]["duplicate"] == 2 and dropped["prompts"]["not one image"] == 1
    assert f"pairs: {figures['pairs']}; prompts without a pair: " in said and "2 duplicate" in said
    rows = table(whole, "candidates")
    consistent = [row["consistent"][0] for row in rows[::2] if row["consistent"]]
    assert figures["compared"] == len(consistent) and 0 < sum(consistent) < len(consistent)
    assert figures["consistent"] == pytest.approx(sum(consistent) / len(consistent), abs=1e-4)
    pairs = table(whole, "pairs")
    assert figures["consistent_of_pairs"] == pytest.approx(
        sum(pair["consistent"] for pair in pairs) / len(pairs), abs=1e-4
    )
    longer = [
        (p["chosen_tokens"] > p["rejected_tokens"]) + 0.5 * (p["chosen_tokens"] == p["rejected_tokens"])
        for p in pairs
    ]
    assert figures["chosen_longer"] == pytest.approx(sum(longer) / len(longer), abs=1e-4)
    assert load_dataset(str(whole), "candidates", split="train").num_rows == 2 * ROWS


def test_the_same_command_calls_no_model_twice_and_loads_none(workplace):
    build(settings(workplace, "again"))
    before, (answered, asked) = contents(workplace / "again"), calls(workplace / "again")
    assert answered == ROWS
    figures = build_of(workplace / "again")["figures"]
    assert asked == 2 * (figures["compared"] + figures["unreadable"])

    def load():
        raise AssertionError("a model was loaded, with nothing left to do")

    def nothing_asked(**changes):
        main(settings(workplace, "again", **changes), Lazy("parrot", load), Lazy("opinion", load))
        assert calls(workplace / "again") == [0, 0]

    nothing_asked()
    assert contents(workplace / "again") == before
    nothing_asked(margin=0.3)
    assert 0 < len(table(workplace / "again", "pairs")) < len(before["pairs/train-00000.parquet"])
    nothing_asked(balance_length=True)
    nothing_asked(max_rows=5, block_size=2, batch_size=1)
    assert len(table(workplace / "again", "candidates")) == 10


def test_other_words_ask_the_critic_alone_and_more_answers_only_the_new_comparisons(workplace):
    build(settings(workplace, "more"))
    other = type("Other", (Opinion,), {"identity": "other"})
    build(settings(workplace, "more"), judge=other)
    assert calls(workplace / "more")[0] == 0 < calls(workplace / "more")[1]
    build(settings(workplace, "more", answers=4))
    rows = table(workplace / "more", "candidates")
    assert len(rows) == 4 * ROWS and calls(workplace / "more")[0] == ROWS
    new = 0
    for at in range(0, len(rows), 4):
        fit = [row for row in rows[at : at + 4] if row["finished"] and row["answer"]]
        two = {row["answer"] for row in fit if row["candidate"] < 2}
        new += len(list(combinations({row["answer"] for row in fit}, 2))) - (len(two) == 2)
    assert calls(workplace / "more")[1] == 2 * new


def test_of_four_answers_the_best_meets_the_worst(workplace):
    build(settings(workplace, "four", answers=4))
    rows = table(workplace / "four", "candidates")
    pairs = {pair["prompt_id"]: pair for pair in table(workplace / "four", "pairs")}
    assert len(pairs) > ROWS / 2
    for at in range(0, len(rows), 4):
        group = [row for row in rows[at : at + 4] if row["score"] is not None]
        for row in group:
            p = {n: expected_p(row, row["answer"], rows[at + n]["answer"]) for n in row["compared_with"]}
            assert row["p_better"] == pytest.approx(list(p.values()))
            assert row["score"] == pytest.approx(sum(p.values()) / len(p))
        if pair := pairs.get(rows[at]["prompt_id"]):
            scores = [row["score"] for row in group]
            by_number = {row["candidate"]: row for row in group}
            assert by_number[pair["chosen_candidate"]]["score"] == max(scores)
            assert by_number[pair["rejected_candidate"]]["score"] == min(scores)
    build(settings(workplace, "four", answers=4, pair_rule="all"))
    assert calls(workplace / "four") == [0, 0]
    every = table(workplace / "four", "pairs")
    assert len(every) > len(pairs)
    for pair in every:
        assert expected_p(pair, *texts_of(pair)) >= 0.6


# Several images, references, a balance of lengths


def test_a_reference_is_shown_only_if_asked_for(workplace):
    heard = []

    class Listening(Opinion):
        identity = "listening"

        def answer(self, cases):
            heard.extend(case.prompt for case in cases)
            return [[Answer({"the first answer": 0.9, "the second answer": 0.1})] for _ in cases]

    with pytest.raises(InputError, match=r"there is no pair"):  # 0.9 in both orders is a tie
        build(settings(workplace, "reference"), judge=Listening)
    assert heard and not any("Correct answer" in prompt for prompt in heard)
    heard.clear()
    with pytest.raises(InputError, match=r"there is no pair .* abstained"):
        build(settings(workplace, "reference", with_reference=True), judge=Listening)
    references = [row["reference"] for row in table(workplace / "reference", "candidates")]
    assert heard and all("Correct answer: " in prompt for prompt in heard)
    assert {prompt.split("Correct answer: ")[1].split("\n")[0] for prompt in heard} <= set(references)
    assert calls(workplace / "reference")[0] == 0


def test_a_critic_that_writes_is_shown_all_images(workplace, tmp_path):
    rows = vision_pairs(2)
    changed = [rows[0] | {"images": [picture(0), picture(1)]}, rows[1] | {"images": []}]
    (tmp_path / "rows").mkdir()
    Dataset.from_list(changed, features=rows.features).to_parquet(tmp_path / "rows" / "train.parquet")

    class Two(Parrot):
        identity = "two"

        @staticmethod
        def one(item, number):
            return Generated(["a cow", "a zebra"][number], 3, True)

    def route(body, _):
        text = body["messages"][0]["content"][-1]["text"]
        return chat(f"Verdict: {'first' if text.index('a zebra') < text.index('a cow') else 'second'}")

    with Scripted({"/v1/chat/completions": route}) as server:
        config = settings(
            workplace,
            "writes",
            dataset_name=str(tmp_path / "rows"),
            critic_name_or_path="m",
            critic_url=server.url,
            critic_writes=True,
        )
        main(config, Lazy("two", lambda: Two()))
        shown = [
            sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
            for body in server.bodies("/v1/chat/completions")
        ]
    assert sorted(shown) == [0, 0, 2, 2]
    pairs = table(workplace / "writes", "pairs")
    assert [len(pair["images"]) for pair in pairs] == [2, 0]
    for pair in pairs:
        assert pair["chosen"][0]["content"][0]["text"] == "a zebra"
        assert (pair["p_chosen"], pair["margin"], pair["consistent"]) == (1, 0.5, True)
    assert len(read_vision_examples(str(workplace / "writes"), "pairs", config="pairs")) == 2


def test_a_balanced_build_says_what_it_left_out(workplace):
    build(settings(workplace, "balanced"))
    before = table(workplace / "balanced", "pairs")
    build(settings(workplace, "balanced", balance_length=True))
    pairs = table(workplace / "balanced", "pairs")
    longer = [pair["chosen_tokens"] - pair["rejected_tokens"] for pair in pairs]
    assert sum(d > 0 for d in longer) == sum(d < 0 for d in longer) > 0
    assert len(pairs) < len(before) and all(pair in before for pair in pairs)
    found = build_of(workplace / "balanced")
    assert found["dropped"]["prompts"]["length balance"] == len(before) - len(pairs)
    assert found["figures"]["chosen_longer"] == 0.5 != found["figures"]["chosen_longer_before_balance"]
    rows = table(workplace / "balanced", "candidates")
    left_out = [row["prompt_id"] for row in rows if row["not_selected_reason"] == "length balance"]
    assert sorted({pair["prompt_id"] for pair in pairs} | set(left_out)) == sorted(
        pair["prompt_id"] for pair in before
    )


# The page


def test_the_gallery_runs_nothing_of_an_answer(whole):
    page = (whole / "gallery.html").read_text()
    assert "<b>A giraffe</b>" not in page and "&lt;b&gt;A giraffe&lt;/b&gt;" in page
    assert SCRIPT not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
    assert page.count("<script>") == 1 and page.count("<article") == 2 * ROWS
    assert page.count("data:image/webp") == ROWS and 'src="http' not in page


USED = """
const form = document.querySelector("form"), seen = [];
const shown = () => [...document.querySelectorAll(".prompt")].filter((each) => each.checkVisibility());
function set(name, value) {
  form.elements[name].value = value;
  form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
}
const kinds = [...form.elements.kind.options].map((option) => option.value).slice(1);
for (const kind of kinds) { set("kind", kind); seen.push([kind, shown().length]); }
set("kind", "");
for (const order of ["widest", "narrowest"]) {
  set("order", order);
  seen.push([order, shown().map((each) => each.querySelector(".good:not(h3 *)")?.textContent ?? "")]);
}
document.querySelector("main button").click();
const large = document.querySelector("dialog img");
seen.push(["large", document.querySelector("dialog").open && large.clientWidth > 200]);
document.title = JSON.stringify(seen);
"""


def test_a_reader_of_the_gallery_sorts_filters_and_enlarges(whole):
    title = re.search(r"<title>(.*)</title>", after(whole / "gallery.html", USED))
    assert title
    seen = dict(json.loads(html.unescape(title[1])))
    reasons = table_of_reasons(whole)
    assert {kind: seen[kind] for kind in seen if kind.startswith("without")} == {
        f"without-{REASONS.index(reason)}": count for reason, count in reasons.items()
    }
    assert seen["pair"] == len(table(whole, "pairs")) and seen["large"] is True
    assert seen["inconsistent"] == sum(not row["consistent"] for row in table(whole, "pairs"))
    widest, narrowest = ([float(text[-4:]) for text in seen[o] if text] for o in ("widest", "narrowest"))
    assert widest == sorted(widest, reverse=True) == narrowest[::-1] and len(set(widest)) > 3
    assert seen["widest"][seen["pair"] :] == [""] * sum(reasons.values()), "without a pair at the end"


def table_of_reasons(folder):
    """Of the answered prompts without a pair, by reason."""
    dropped = build_of(folder)["dropped"]["prompts"]
    return {reason: count for reason, count in dropped.items() if reason in REASONS}


# Crashes


def test_kill_9_at_five_moments_then_the_identical_dataset_and_nothing_asked_twice(whole, workplace):
    """Guards against UnifiedReward's resuming by length, which repeats items."""
    folder, seen = workplace / "killed", []
    for moment in (0, 5, 9, 2, 6):
        kill_at(moment, build, settings(workplace, "killed"))
        answers, comparisons = kept(folder, "answers"), kept(folder, "comparisons")
        assert len(set(answers)) == len(answers) and len(set(comparisons)) == len(comparisons)
        seen.append((len(answers), len(comparisons)))
    figures = build_of(whole)["figures"]
    everything = (2 * ROWS, figures["compared"] + figures["unreadable"])
    # Before anything, among the answers, among the comparisons twice, and while the tables were written.
    assert seen[0] == (0, 0) and 0 < seen[1][0] < everything[0] and seen[1][1] == 0
    assert seen[2][0] == seen[3][0] == everything[0] and 0 < seen[2][1] < seen[3][1] < everything[1]
    assert seen[4] == everything
    build(settings(workplace, "killed"))
    assert contents(folder) == contents(whole) and calls(folder) == [0, 0]


def test_a_resumed_run_may_have_nothing_left_but_what_cannot_be_read(workplace):
    """A critic that could never be read is an error; one that was read before is not taken for such a one."""
    build(settings(workplace, "unread"))
    folder = workplace / "unread"
    file = folder / "work" / "comparisons-00000.sqlite"
    entries = values(file)
    unread = [key for key, value in entries.items() if value is None]
    assert 0 < len(unread) < len(entries)
    forget(file, unread)
    before = contents(folder)
    build(settings(workplace, "unread"))
    assert calls(folder) == [0, 2 * len(unread)] and contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None, "model_name_or_path": "my/vlm"}, "--dataset_name is missing"),
        ({"answers": 1}, r"--answers is 1; it lies in \[2, 16\]"),
        ({"temperature": 0.0}, r"--temperature is 0\.0"),
        ({"margin": 0.6}, r"--margin is 0\.6; it lies in \[0, 0\.5\)"),
        ({"seed": -1}, "--seed is -1"),
        ({"adapter": "./nowhere"}, "--adapter: there is no ./nowhere"),
        ({"critic_url": "http://localhost:1"}, "--critic_name_or_path is missing"),
        ({"critic_writes": True}, "--critic_writes is for a server"),
        (
            {"critic_url": "http://localhost:1", "critic_name_or_path": "m", "critic_adapter": "a/b"},
            "--critic_adapter and --critic_revision are for a critic that is loaded here",
        ),
    ],
)
def test_options_that_cannot_be_are_named(workplace, changes, message):
    with pytest.raises(InputError, match=message):
        settings(workplace, "bad", **changes)


def test_missing_words_are_named_before_anything_is_generated(workplace, tmp_path):
    (tmp_path / "compare.txt").write_text("{question} {first} {second}")

    def load():
        raise AssertionError("a model was loaded")

    config = settings(workplace, "bad", critic_templates=str(tmp_path), with_reference=True)
    with pytest.raises(InputError, match=r"has no compare_with_reference\.txt"):
        main(config, Lazy("parrot", load))


def test_prompts_that_no_critic_by_log_odds_can_see_are_named(workplace, tmp_path):
    rows = vision_pairs(2)
    none = [row | {"images": []} for row in rows]
    Dataset.from_list(none, features=rows.features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"none of its 2 prompts can be used \(2 not one image\)"):
        build(settings(workplace, "bad", dataset_name=str(tmp_path)))
