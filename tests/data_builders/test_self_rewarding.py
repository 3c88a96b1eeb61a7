"""The self-rewarding builder: what it keeps, repeats and writes; judge and detector are stand-ins."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from builds import build_of, calls, check_is_a_dataset, contents, header_of, kept, kill_at
from datasets import load_dataset
from launching import launch

from data_builders.images.config import parse_source
from data_builders.self_rewarding import SelfRewardingConfig, main
from prefopt.detectors import Box
from prefopt.diffusion.generator import Generator, Sampler
from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.files import exclusive_lock
from prefopt.judges.questions import NO, YES, Answer
from prefopt.judges.rubric import RUBRICS
from prefopt.loading import Lazy

PROMPTS = ["one red lion", "two lions", "a zebra in snow", "three zebras", "lions at night"]
CANDIDATES = 4


class Whimsical:
    """A judge whose answer is a hash of what it sees and is asked."""

    identity = "whimsical"

    def answer(self, cases):
        return [[self.one(case.image, question) for question in case.questions] for case in cases]

    @staticmethod
    def one(image, question):
        digest = hashlib.sha256(image.tobytes() + question.text.encode()).digest()
        yes = 0.01 + 0.98 * digest[0] / 255
        return Answer({YES: yes, NO: 1 - yes})


class Somewhere:
    """A detector that sees its class in the middle, as surely as the image is red."""

    identity = "somewhere"

    def detect(self, images, classes):
        return [
            [Box(names[0], np.float32(0.6 + np.asarray(image)[..., 0].mean() / 1000), 1, 1, 6, 6)]
            for image, names in zip(images, classes, strict=True)
        ]


class Nowhere(Somewhere):
    identity = "nowhere"

    def detect(self, images, classes):
        return [[] for _ in images]


class Silent(Whimsical):
    """A judge whose next token is neither yes nor no."""

    identity = "silent"

    @staticmethod
    def one(image, question):
        return Answer({YES: 0.5, NO: 0.5}, other_mass=0.99)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny pipeline and a prompts file."""
    folder = tmp_path_factory.mktemp("self_rewarding")
    tiny.tiny_stable_diffusion(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def build(config, judge=Whimsical, detector=Somewhere):
    """Build with these in place of real models."""
    main(config, Lazy(judge.identity, judge), Lazy(detector.identity, detector))


def settings(workplace, name, **changes):
    options = {
        "classes": ["lion", "zebra"],
        "prompts": str(workplace / "prompts.txt"),
        "model_name_or_path": str(workplace / "model"),
        "candidates": CANDIDATES,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "batch_size": 3,
        "block_size": 2,
        "judge_batch_size": 3,
        "judge_model_name_or_path": "whimsical",
        "detector": "somewhere",
        "exports": ["sft", "pairs", "ranked", "pickapic", "imagefolder"],
        "output_dir": str(workplace / name),
    }
    return SelfRewardingConfig(**options | changes)


@pytest.fixture(scope="module")
def whole(workplace):
    build(settings(workplace, "whole"))
    return workplace / "whole"


def test_every_candidate_is_in_the_table_with_its_answers(whole):
    rows = pq.read_table(whole / "candidates").to_pylist()
    assert len(rows) == len(PROMPTS) * CANDIDATES
    assert [row["prompt"] for row in rows[::CANDIDATES]] == PROMPTS
    assert [row["class"] for row in rows[::CANDIDATES]] == ["lion", "lion", "zebra", "zebra", "lion"]
    for row in rows:
        assert row["hard_score"] == sum(row["points"])
        assert len(row["questions"]) == len(row["log_odds"]) == 10
        assert row["selected"] == (row["not_selected_reason"] == "") and row["invalid_reason"] == ""
    for start in range(0, len(rows), CANDIDATES):
        group = rows[start : start + CANDIDATES]
        tops = [row for row in group if row["hard_score"] == max(r["hard_score"] for r in group)]
        (chosen,) = (row for row in group if row["selected"])
        assert chosen["confidence"] == max(row["confidence"] for row in tops)


def test_a_build_is_a_dataset_of_the_hub(whole, tmp_path):
    """Every export but the folder of pictures, which datasets reads by another loader than Parquet's."""
    check_is_a_dataset(whole, tmp_path / "copy", "pairs")
    names = [config["config_name"] for config in header_of(whole)["configs"]]
    assert names == ["candidates", "sft", "pairs", "ranked", "pickapic"]
    assert len(read_sft(str(tmp_path / "copy"), config="imagefolder")) == len(PROMPTS)
    card = (whole / "README.md").read_text()
    assert "## The rubric class_conditional\n\n```\n- name: realistic\n" in card and "| detector | " in card


def test_the_exports_load_where_they_are_used(whole):
    images = read_sft(str(whole / "sft"))
    assert len(images) == len(PROMPTS)
    pairs = read_preferences(str(whole / "pairs"))
    assert 0 < len(pairs) <= len(PROMPTS)
    rows = load_dataset(str(whole / "ranked"), split="train")
    assert [sorted(row) for row in rows["ranks"]] == list(rows["ranks"])
    folder = load_dataset("imagefolder", data_dir=str(whole / "imagefolder"), split="train")
    assert folder["text"] == PROMPTS and folder[0]["image"].size == rows[0]["images"][0].size
    votes = read_preferences(str(whole / "pickapic"))
    assert len(votes) == len(pairs)
    columns = load_dataset(str(whole / "pickapic"), split="train")
    assert {"jpg_0", "jpg_1", "label_0", "label_1", "caption"} == set(columns.column_names)
    assert isinstance(columns[0]["jpg_0"], bytes) and isinstance(columns[0]["label_0"], float)


def test_the_card_and_the_gallery_are_there(whole):
    configurations = load_dataset(str(whole), "sft", split="train")
    assert len(configurations) == len(PROMPTS)
    assert PROMPTS[0] in (whole / "gallery.html").read_text()
    figures = build_of(whole)["figures"]
    assert figures["prompts"] == {"lion": 3, "zebra": 2}
    assert figures["candidates"] == len(PROMPTS) * CANDIDATES
    assert sum(figures["verdicts"]["realistic"].values()) == figures["judged"] == len(PROMPTS) * CANDIDATES


def test_the_same_command_calls_no_model_twice_and_loads_none(whole, workplace, monkeypatch):
    before = contents(whole)
    images = len(PROMPTS) * CANDIDATES
    assert calls(whole) == [images, 10 * (images + len(PROMPTS)), images]

    def load():
        raise AssertionError("a model was loaded, with nothing left to do")

    monkeypatch.setattr("data_builders.images.generation.load_generator", load)
    main(settings(workplace, "whole"), Lazy("whimsical", load), Lazy("somewhere", load))
    assert calls(whole) == [0, 0, 0]
    assert contents(whole) == before


def test_another_question_asks_that_one_alone(whole, workplace, tmp_path):
    text = (RUBRICS / "class_conditional.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("Do light, shadow", "Do light and shadow"))
    build(settings(workplace, "whole", rubric=str(tmp_path / "mine.yaml")))
    assert calls(whole) == [0, len(PROMPTS) * (CANDIDATES + 1), 0]
    build(settings(workplace, "whole"))
    assert calls(whole) == [0, 0, 0]


def test_another_selection_asks_nothing(whole, workplace):
    build(settings(workplace, "whole", pair_rule="all", max_pairs_per_prompt=2, detection_threshold=0.61))
    assert calls(whole) == [0, 0, 0]
    assert len(read_preferences(str(whole / "pairs"))) > len(PROMPTS)
    build(settings(workplace, "whole"))


def test_all_models_resident_make_the_same(whole, workplace):
    build(settings(workplace, "resident", keep_resident=True))
    assert contents(workplace / "resident") == contents(whole)


def test_several_sources_take_turns(workplace):
    build(settings(workplace, "sources", sources=["steps=1", "steps=2"]))
    rows = pq.read_table(workplace / "sources" / "candidates").to_pylist()
    assert [row["candidate"] for row in rows[:CANDIDATES]] == [0, 1, 2, 3]
    assert [row["num_inference_steps"] for row in rows[:CANDIDATES]] == [1, 2, 1, 2]
    half = len(PROMPTS) * CANDIDATES // 2
    assert calls(workplace / "sources")[:2] == [half, half], "one model twice is counted twice"
    identities = list(build_of(workplace / "sources")["identity"].values())
    assert len(set(identities)) == 4 and all(identities)


def test_a_source_says_what_differs():
    base = Generator("m", "a", 0.5, "r", sampler=Sampler(20, 7.5))
    expected = Generator("m", "a", 0.5, "r", sampler=Sampler(4, 0.0))
    assert parse_source("steps=4 guidance=0", base) == expected
    assert parse_source("other", base) == Generator("other", None, 0.5, sampler=Sampler(20, 7.5))
    with pytest.raises(InputError, match="unknown 'step'"):
        parse_source("m step=3", base)
    with pytest.raises(InputError, match="steps is 'x', not a number"):
        parse_source("steps=x", base)


def test_zero_detections_everywhere_is_an_error_that_loses_nothing(workplace):
    with pytest.raises(InputError, match=r"nothing was selected .*5 no detection"):
        build(settings(workplace, "nowhere", exports=["sft"]), detector=Nowhere)
    assert build_of(workplace / "nowhere")["dropped"]["prompts"] == {"no detection": 5}
    build(settings(workplace, "nowhere", exports=["sft"]))
    assert calls(workplace / "nowhere") == [0, 0, len(PROMPTS) * CANDIDATES]


def test_a_judge_that_says_neither_yes_nor_no_makes_no_pair(workplace):
    with pytest.raises(InputError, match=r"nothing was selected"):
        build(settings(workplace, "silent", exports=["pairs"]), judge=Silent)
    verdicts = build_of(workplace / "silent")["figures"]["verdicts"]
    assert verdicts["realistic"] == {"unclear": len(PROMPTS) * CANDIDATES}


def test_two_builds_in_one_folder_are_an_error(whole, workplace, tmp_path):
    options = {"prompts": workplace / "prompts.txt", "classes": ["lion", "zebra"], "output_dir": whole}
    with exclusive_lock(whole):
        second = launch("data_builders/self_rewarding.py", options, tmp_path / "log")
        assert second.wait() == 2
    assert "another run is using" in second.text()


def test_a_corrupt_block_is_named(workplace):
    build(settings(workplace, "corrupt"))
    block = next((workplace / "corrupt" / "work").rglob("block-00001*.parquet"))
    block.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"block-00001.* cannot be read.*Delete it"):
        build(settings(workplace, "corrupt"))
    block.unlink()
    build(settings(workplace, "corrupt"))
    assert calls(workplace / "corrupt")[0] == 2 * CANDIDATES


def test_a_full_disk_is_named_and_loses_nothing(workplace, monkeypatch):
    build(settings(workplace, "full"))
    before = contents(workplace / "full")

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(InputError, match=r"could not write .*full: No space left"):
            build(settings(workplace, "full"))
    assert contents(workplace / "full") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, "--classes is"),
        ({"classes": ["lion", "lion"]}, "--classes names 'lion' twice"),
        ({"classes": ["lion."]}, "a class is a name as it stands within a prompt: write lion"),
        ({"exports": ["sft", "all"]}, "--exports all is unknown"),
        ({"detection_threshold": 0.0}, r"--detection_threshold is 0\.0"),
        ({"candidates": 2, "sources": ["a", "b", "c"]}, "3 --sources for 2 --candidates"),
        ({"rubric": "nowhere"}, "there is no rubric 'nowhere'"),
        ({"judge_model_name_or_path": "models/of/mine"}, "--judge_model_name_or_path: there is no models/of"),
        ({"detector": "./owl"}, "--detector: there is no ./owl"),
        ({"classes": ["lion"]}, "the prompt 'a zebra in snow' names none of the classes"),
        ({"classes": ["lion", "zebra", "snow"]}, "names zebra and snow of the classes"),
    ],
)
def test_options_that_cannot_be_are_named(workplace, changes, message):
    with pytest.raises(InputError, match=message):
        build(settings(workplace, "bad", **changes))


def test_kill_9_at_ten_moments_then_the_identical_dataset_and_no_call_repeated(whole, workplace):
    """Guards against UnifiedReward's resuming by length, which repeats items."""
    folder, expected = workplace / "killed", contents(whole)
    chance = np.random.default_rng(0)
    for moment in [0, 1, *chance.integers(2, 6, size=8)]:
        kill_at(int(moment), build, settings(workplace, "killed"))
    images = len(PROMPTS) * CANDIDATES
    kept_answers = len(kept(folder, "answers"))
    drawn = sum(pq.read_metadata(file).num_rows for file in (folder / "work").rglob("block-*.parquet"))
    build(settings(workplace, "killed"))
    assert contents(folder) == expected
    assert calls(folder)[0] == images - drawn
    assert calls(folder)[1] == 10 * (images + len(PROMPTS)) - kept_answers
