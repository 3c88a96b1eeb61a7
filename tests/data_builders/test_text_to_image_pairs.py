"""The pairs builder: stages, reasons, the same dataset from any number of processes and after a crash."""

import io
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from builds import build_of, calls, check_is_a_dataset, header_of
from launching import torchrun
from PIL import Image

from data_builders.engine.reasons import LOWER, NO_MARGIN, SAME_IMAGE, TOO_FEW
from data_builders.engine.stages import Group, flow, in_threads, is_valid
from data_builders.engine.tables import PAIRS
from data_builders.export import writers
from data_builders.export.tables import EXPORTS
from data_builders.export.writers import write_exports
from data_builders.images.build import replaced
from data_builders.images.generation import candidate_seed, encode, expand
from data_builders.images.selection import (
    PairOptions,
    pairs,
    rank,
    ranked,
    select_pairs,
)
from data_builders.prompts.reading import distinct, identify, pocket_captions, read_prompts
from data_builders.text_to_image_pairs import TextToImagePairsConfig, main
from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.diffusion.tables import read_preferences
from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Answer
from prefopt.loading import Lazy
from prefopt.pocket.world import parse, train_scenes
from prefopt.records import in_test

SCRIPT = "data_builders/text_to_image_pairs.py"
PROMPTS = [f"{number} red lions" for number in ("no", "two", "three", "four", "five", "six", "seven")]
BLOCKS = 4


def redness(records):
    """The stage in place of a judge: how red a valid image is, if the prompt names its blue."""
    for record in records:
        if is_valid(record):
            with Image.open(io.BytesIO(record["image"]["bytes"])) as image:
                red, _, blue = image.getpixel((0, 0))
            assert record["prompt"] == f"blue {blue}"
            record = record | {"hard_score": 1.0, "soft_score": float(red), "judge_score": float(red)}
        yield record


def painted(colours):
    """The stage in place of `generate`: candidates get the next (red, blue); None: not finite."""
    paint = iter(colours)

    def stage(records):
        for record in records:
            colour = next(paint)
            array = np.full((8, 8, 3), np.nan) if colour is None else np.zeros((8, 8, 3))
            if colour is not None:
                array[..., 0], array[..., 2] = colour[0] / 255, colour[1] / 255
            yield record | {"pixels": array, "seconds": 0.5}

    return stage


def judged(prompts, colours, *, candidates, min_margin=0.0):
    encoded = in_threads(encode, threads=2, ahead=3)
    stages = [expand(range(candidates), 0), painted(colours), encoded, redness, rank]
    return list(flow(identify(prompts), [*stages, select_pairs(PairOptions(min_margin=min_margin))]))


def reasons(rows):
    return [row.get("invalid_reason", "") or row["not_selected_reason"] for row in rows]


def test_stages_compose_and_an_invalid_record_carries_its_reason():
    """Guards against SRT2I's captions zipped with sorted files: an invalid image shifts nobody's prompt."""
    colours = [(50, 40), None, (90, 40), (70, 40), (60, 80), (0, 0), (20, 80), (60, 80)]
    rows = judged(["blue 40", "blue 80"], colours, candidates=4)
    assert [row["rank"] for row in rows] == [3, None, 1, 2, 1, None, 3, 1]
    assert [row["selected"] for row in rows] == [False, False, True, False, True, False, False, True]
    assert reasons(rows) == [LOWER, "not finite", "", LOWER, "", "black", LOWER, ""]
    assert rows[1].get("image") is None and rows[5]["image"] is not None
    with Image.open(io.BytesIO(rows[2]["image"]["bytes"])) as image:
        assert image.format == "WEBP" and image.getpixel((3, 3)) == (90, 0, 40)
    assert rows[4]["pixels_sha256"] == rows[7]["pixels_sha256"] != rows[6]["pixels_sha256"]


def test_a_tie_gives_no_pair():
    """Guards against AGFSync's winner and loser that are one image; and against a margin of nothing."""
    tied = judged(["blue 9"], [(50, 9)] * 3, candidates=3)
    assert set(reasons(tied)) == {NO_MARGIN} and {row["rank"] for row in tied} == {1}
    close = judged(["blue 9"], [(50, 9), (52, 9)], candidates=2, min_margin=3)
    assert set(reasons(close)) == {NO_MARGIN}
    anew = select_pairs(PairOptions(min_margin=2.0))(close)
    assert [row["selected"] for row in anew] == [False, True], "a selection is decided anew"
    alone = judged(["blue 9"], [(50, 9), (0, 0)], candidates=2)
    assert reasons(alone) == [TOO_FEW, "black"]
    apart = judged(["blue 9"], [(50, 9), (51, 9), (52, 9)], candidates=3)
    narrow = PairOptions("adjacent", min_margin=1.5)
    assert set(reasons(select_pairs(narrow)(apart))) == {NO_MARGIN}, "though the first and the last are apart"
    same = [row | {"pixels_sha256": "same"} for row in close]
    assert set(reasons(select_pairs(PairOptions())(same))) == {SAME_IMAGE}


def test_a_seed_depends_on_seed_prompt_and_candidate_alone():
    assert candidate_seed(0, "a red lion", 1) == 0x13650BEC, "seeds on disk mean what they meant"
    seeds = {candidate_seed(s, p, c) for s in range(5) for p in ("a", "b", "a 1") for c in range(20)}
    assert len(seeds) == 300 and all(0 <= seed < 2**32 for seed in seeds)
    rows = list(expand(range(3), 7)(identify(["a", "b"])))
    assert [row["seed"] for row in rows[3:]] == [candidate_seed(7, "b", i) for i in range(3)]


def test_prompts_come_from_a_file_and_duplicates_are_counted(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa lion\r\nzwei L\u00f6wen \u2028 am See\na lion \nsnow\n".encode())
    left_out = Counter()
    records = list(distinct(identify(read_prompts(str(file), None, 0)), left_out))
    assert [record["prompt"] for record in records] == ["a lion", "zwei L\u00f6wen \u2028 am See", "snow"]
    assert left_out == {"duplicate": 1} and len({record["prompt_id"] for record in records}) == 3
    assert read_prompts(str(file), 1, 0) == ["a lion"]


@pytest.mark.parametrize(
    ("content", "number", "message"),
    [
        (None, None, "no prompts file"),
        (b"", None, "is empty"),
        (b" \n\n", None, "is empty"),
        (b"a\nb\n\nc\n", None, "line 3 is empty"),
        (b"a\n\xff\n", None, "no UTF-8"),
        (b"a\nb\n", 3, "--num_prompts is 3, but .* has 2"),
    ],
)
def test_a_bad_prompts_file_is_named(tmp_path, content, number, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(str(file), number, 0)


def test_the_pocket_s_prompts_are_seeded_captions_of_training_scenes():
    captions = pocket_captions(3)
    assert len(set(captions)) == len(captions) == 6 * len(train_scenes())
    assert {parse(text) for text in captions[: len(train_scenes())]} == set(train_scenes())
    assert captions == pocket_captions(3) != pocket_captions(4)
    assert read_prompts("pocket", 5, 3) == captions[:5]


def test_pairs_are_split_by_prompt_into_bounded_files(tmp_path):
    prompts = [f"blue {blue}" for blue in range(10, 40)]
    colours = [(red, blue) for blue in range(10, 40) for red in (50, 90, 20)]
    rows = judged(prompts, colours, candidates=3)
    size = len(rows[0]["image"]["bytes"])
    groups = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    made = [Group(group, ranked(group), pairs(group, PairOptions())) for group in groups]
    export = {"pairs": EXPORTS["pairs"]}
    counts = write_exports(made, tmp_path, export, test_fraction=0.3, max_bytes=8 * size)
    test = [prompt for prompt in prompts if in_test(rows[3 * prompts.index(prompt)]["prompt_id"], 0.3)]
    assert 0 < len(test) < 30 and counts["pairs"] == {"test": len(test), "train": 30 - len(test)}
    assert len(list((tmp_path / "pairs").glob("train-*.parquet"))) >= (30 - len(test)) // 5
    for split, expected in (("test", test), ("train", [p for p in prompts if p not in test])):
        table = read_preferences(str(tmp_path / "pairs"), split=split)
        assert table.facts["prompt"][:] == expected and not table.dropped
        for i, content in enumerate(table.images(0)):
            with Image.open(io.BytesIO(content)) as image:
                assert image.convert("RGB").getpixel((0, 0))[0] == (90, 20)[i]
    assert set(table.rows.features) == set(PAIRS)
    write_exports(made, tmp_path, export, test_fraction=0.0, max_bytes=2**20)
    assert [path.name for path in sorted((tmp_path / "pairs").iterdir())] == ["train-00000.parquet"]


# The whole builder, on tiny random models


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Models, prompts, and the dataset that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("builder")
    tiny.tiny_stable_diffusion(folder / "sd")
    tiny.tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[2]]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what torchrun gives each process
    main(settings(folder, "whole"))
    yield folder
    torch.set_num_threads(threads)


def settings(folder, output, **changes):
    config = TextToImagePairsConfig(
        prompts=str(folder / "prompts.txt"),
        candidates=3,
        model_name_or_path=str(folder / "sd"),
        judge_model_name_or_path=str(folder / "clip"),
        num_inference_steps=2,
        batch_size=4,
        block_size=2,
        test_fraction=0.4,
        output_dir=str(folder / output),
    )
    return replace(config, **changes)


def candidates_of(folder):
    files = sorted((folder / "candidates").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).drop(["seconds"]).to_pylist()]
    return sorted(rows, key=lambda row: (PROMPTS.index(row["prompt"]), row["candidate"]))


def blocks_of(folder):
    return list((folder / "work" / "images-0").glob("block-*.parquet"))


def generated(folder):
    """How many images the last run generated."""
    return calls(folder)[0]


def assert_identical(folder, other):
    assert candidates_of(folder) == candidates_of(other)
    assert [p.name for p in (folder / "work" / "images-0").iterdir() if p.name.startswith(".")] == []
    names = sorted(path.name for path in (folder / "pairs").iterdir())
    assert names == sorted(path.name for path in (other / "pairs").iterdir()) and len(names) == 2
    for name in names:
        assert (folder / "pairs" / name).read_bytes() == (other / "pairs" / name).read_bytes()
    figures, others = build_of(folder)["figures"], build_of(other)["figures"]
    timing = {"seconds_generating": 0}
    assert figures | timing == others | timing and build_of(folder)["dropped"] == build_of(other)["dropped"]


def test_a_build_is_whole_and_says_what_it_did(workplace):
    folder = workplace / "whole"
    rows, build = candidates_of(folder), build_of(folder)
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert (
        build["figures"]["prompts"] == {"of no class": 7}
        and build["figures"]["candidates"] == len(rows) == 21
    )
    assert build["dropped"]["prompts"]["duplicate"] == 1
    assert len(blocks_of(folder)) == BLOCKS and build["run"]["processes"] == 1
    assert calls(folder) == [21, 21]
    pairs = build["rows"]["pairs"]
    assert sum(pairs.values()) == sum(row["selected"] for row in rows) == 7
    assert all(row["height"] == row["width"] == 16 and row["model_identity"] for row in rows)
    card = (folder / "README.md").read_text()
    assert "| rows | 7 pairs |" in card and "1 duplicate" in card
    for split, count in pairs.items():
        table = read_preferences(str(folder / "pairs"), split=split)
        assert len(table) == count
        for row in table.rows.remove_columns(["chosen", "rejected"]):
            scores = [r["soft_score"] for r in rows if r["prompt"] == row["prompt"]]
            assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
            assert row["margin"] == pytest.approx(max(scores) - min(scores), abs=1e-5)


def test_a_build_is_a_dataset_of_the_hub(workplace, tmp_path):
    folder = workplace / "whole"
    check_is_a_dataset(folder, tmp_path / "copy", "pairs")
    header, card = header_of(folder), (folder / "README.md").read_text()
    assert header["license"] == "unknown" and header["size_categories"] == ["n<1K"]
    assert header["task_categories"] == ["text-to-image"] and header["tags"][0] == "prefopt"
    assert "Unknown: whoever publishes this dataset has to choose one" in card
    assert "- name: preferred\n  polarity: positive\n  text: Is this a picture that a person" in card
    assert str(workplace) not in card, "a card says nothing of the folders of who made it"


def test_a_candidate_can_be_generated_again_alone(workplace):
    pipeline = load_pipeline(workplace / "sd")
    for row in candidates_of(workplace / "whole")[4:6]:
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        sampler = Sampler(**{name: row[name] for name in names})
        again = next(sample(pipeline, [row["prompt"]], [row["seed"]], sampler))
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert np.abs(np.asarray(again, int) - np.asarray(image.convert("RGB"))).max() <= 1


def test_the_same_command_loads_nothing_and_neither_does_another_selection(workplace, monkeypatch):
    monkeypatch.setattr("data_builders.images.generation.load_generator", None)
    monkeypatch.setattr("prefopt.judges.loading.RewardJudge", lambda *_, **__: pytest.fail("loaded"))
    folder = workplace / "whole"
    before = candidates_of(folder)
    margins = pq.read_table(folder / "pairs", columns=["margin"])["margin"].to_pylist()
    fourth = sorted(margins)[3] - 1e-6  # the table has float32 numbers
    main(settings(workplace, "whole", min_margin=fourth, test_fraction=0.0))
    build = build_of(folder)
    assert calls(folder) == [0, 0] and build["rows"]["pairs"] == {"train": 4}
    assert build["dropped"]["prompts"] == {"duplicate": 1, NO_MARGIN: 3}
    left_out = [row for row in candidates_of(folder) if row["not_selected_reason"] == NO_MARGIN]
    assert len(left_out) == 9 and not any(row["selected"] for row in left_out)
    with pytest.raises(InputError, match=r"nothing was selected .*7 no margin"):
        main(settings(workplace, "whole", min_margin=1000.0))
    main(settings(workplace, "whole"))
    assert candidates_of(folder) == before


@pytest.mark.parametrize("rule", ["best_worst", "adjacent", "all"])
def test_no_rejected_image_is_there_to_imitate(workplace, rule):
    """The images of `sft` and `imagefolder` are each prompt's best, and the figures say so."""
    shutil.copytree(workplace / "whole", workplace / rule)
    folder, exports = workplace / rule, ["sft", "imagefolder", "pairs"]
    main(settings(workplace, rule, exports=exports, pair_rule=rule, test_fraction=0.0))
    best = {}
    for row in candidates_of(folder):
        if row["rank"] == 1:
            best[row["prompt"]] = row
    (file,) = (folder / "sft").iterdir()
    imitated = {row["prompt"]: row["image"]["bytes"] for row in pq.read_table(file).to_pylist()}
    assert imitated == {prompt: row["image"]["bytes"] for prompt, row in best.items()} and len(best) == 7
    files = {path.read_bytes() for path in (folder / "imagefolder").rglob("*.webp")}
    assert files == set(imitated.values())
    (file,) = (folder / "pairs").iterdir()
    assert not files & {row["rejected"]["bytes"] for row in pq.read_table(file).to_pylist()}
    build, mean = build_of(folder), np.mean([row["judge_score"] for row in best.values()])
    assert build["figures"]["mean_soft_score_of_selected"] == pytest.approx(mean, abs=1e-4)
    assert build["figures"]["prompts_with_selected"] == {"of no class": 7}
    assert build["selection"] == "the best soft score of each prompt that has a pair"
    page = (folder / "gallery.html").read_text()
    assert "The best soft score of each prompt that has a pair." in page
    assert page.count("&#10003; selected") == 7


def test_the_gallery_shows_the_pairs_if_a_table_holds_them(workplace):
    shutil.copytree(workplace / "whole", workplace / "shown")
    for exports, said in ((["ranked"], "0 pairs"), (["pairs"], "7 pairs"), (["pickapic"], "7 pairs")):
        main(settings(workplace, "shown", exports=exports))
        page = (workplace / "shown" / "gallery.html").read_text()
        assert f"7 prompts, 21 images, {said}" in page
        assert page.count("&#9650; chosen over image") == int(said[0]), "best against worst"


def test_more_prompts_generate_only_the_new_blocks(workplace):
    main(settings(workplace, "grown", num_prompts=4))
    assert generated(workplace / "grown") == 12
    main(settings(workplace, "grown"))
    assert generated(workplace / "grown") == 9
    assert_identical(workplace / "grown", workplace / "whole")


def test_other_settings_in_the_folder_are_an_error_that_names_both_sides(workplace, tmp_path):
    for changes, message in (
        ({"seed": 5}, r"seed: 0 \(folder\), 5 \(this run\)"),
        ({"guidance_scale": 1.0}, r"guidance_scale: 3.0 \(folder\), 1.0 \(this run\)"),
        (
            {"model_name_or_path": tiny.tiny_stable_diffusion(tmp_path / "other", seed=1)},
            "model_identity: ",
        ),
        ({"adapter": tiny.tiny_adapter(workplace / "sd", tmp_path / "lora")}, "adapter_identity: None"),
    ):
        with pytest.raises(InputError, match=f"{message}.*Name another --output_dir"):
            main(settings(workplace, "whole", **changes))
    (tmp_path / "prompts.txt").write_text("something else\nand more")
    with pytest.raises(InputError, match="holds 4 blocks of other prompts"):
        main(settings(workplace, "whole", prompts=str(tmp_path / "prompts.txt")))
    with pytest.raises(InputError, match="nowhere"):
        main(settings(workplace, "whole", model_name_or_path=str(tmp_path / "nowhere")))


def test_a_folder_that_lost_its_identity_is_not_given_another(workplace):
    folder = workplace / "unsigned"
    shutil.copytree(workplace / "whole", folder)
    (folder / "work" / "images-0" / "identity.json").unlink()
    with pytest.raises(InputError, match="blocks of other prompts or settings"):
        main(settings(workplace, "unsigned", seed=5))
    main(settings(workplace, "unsigned"))
    assert_identical(folder, workplace / "whole")


def test_another_judge_judges_again_and_nothing_is_generated(workplace, tmp_path):
    main(settings(workplace, "rejudged"))
    other = tiny.tiny_clip(tmp_path / "clip", seed=1)
    main(settings(workplace, "rejudged", judge_model_name_or_path=other))
    assert calls(workplace / "rejudged") == [0, 21]
    assert candidates_of(workplace / "rejudged") != candidates_of(workplace / "whole")


class Broken:
    """A judge whose reward of one image in three is not a number."""

    def answer(self, cases):
        rewards = [np.nan if np.asarray(case.image).sum() % 3 == 0 else 0.5 for case in cases]
        return [
            [Answer({YES: p, NO: 1 - p}) for _ in case.questions]
            for case, p in zip(cases, rewards, strict=True)
        ]


def test_another_rubric_in_the_folder_says_what_it_replaces(tmp_path):
    settings = {"rubric": "reward", "question_weights": [], "judge_model_name_or_path": "pocket"}
    settings |= {"judge_url": None, "discriminator_name_or_path": None}
    assert replaced(tmp_path, settings) == "", "nothing is there"
    (tmp_path / "BUILD.json").write_text(json.dumps({"settings": settings}))
    assert replaced(tmp_path, settings) == ""
    said = replaced(tmp_path, settings | {"rubric": "mine.yaml", "question_weights": ["a=2"]})
    assert said.endswith(
        "this replaces tables that were made with rubric reward (now mine.yaml), "
        "question_weights [] (now ['a=2'])"
    )


def test_a_score_that_is_not_finite_makes_its_candidate_invalid(workplace):
    with pytest.raises(InputError, match="nothing was selected"):
        main(settings(workplace, "broken"), Lazy("broken", Broken))
    found = Counter(row["invalid_reason"] for row in candidates_of(workplace / "broken"))
    assert found.keys() == {"", "score not finite"} and found.total() == 21
    assert build_of(workplace / "broken")["dropped"]["invalid"] == {
        "score not finite": found["score not finite"]
    }
    ranks = {row["rank"] is None for row in candidates_of(workplace / "broken") if row["invalid_reason"]}
    assert ranks == {True}


def test_a_question_that_needs_a_detector_is_named(workplace, tmp_path):
    (tmp_path / "own.yaml").write_text("- {name: there, check: presence, polarity: positive}")
    said = r"own\.yaml: the question 'there' needs a detector; name a --detector, an option of self_rewarding"
    with pytest.raises(InputError, match=said):
        main(settings(workplace, "detector", rubric=str(tmp_path / "own.yaml")), Lazy("unused", Broken))


def test_without_arguments_the_pocket_generates_images_of_160_of_its_captions():
    assert TextToImagePairsConfig().prompts == "pocket" and TextToImagePairsConfig().num_prompts == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, r"--candidates is 1; it lies in \[2, 10000\]"),
        ({"min_margin": float("nan")}, "--min_margin is nan"),
        ({"test_fraction": 1.0}, "--test_fraction"),
        ({"height": 12}, "--height is 12; it is a multiple of 8"),
        ({"prompts": None}, "--prompts is missing"),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path, changes, message):
    for name in ("sd", "clip", "prompts.txt"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=message):
        settings(tmp_path, "bad", **changes)


def test_a_damaged_block_is_named(workplace):
    main(settings(workplace, "damaged", num_prompts=2))
    block = blocks_of(workplace / "damaged")[0]
    block.write_bytes(block.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{block.name} cannot be read.*Delete it"):
        main(settings(workplace, "damaged", num_prompts=2))


def test_two_processes_make_the_identical_dataset(workplace):
    """By path, as a user starts it; the world size is the one that the processes saw."""
    config = settings(workplace, "two")
    names = ("prompts", "candidates", "model_name_or_path", "judge_model_name_or_path", "num_inference_steps")
    names = (*names, "batch_size", "block_size", "test_fraction", "output_dir")
    torchrun(SCRIPT, {name: getattr(config, name) for name in names})
    assert build_of(workplace / "two")["run"]["processes"] == 2
    assert generated(workplace / "two") == 21
    assert_identical(workplace / "two", workplace / "whole")


def die_at(call, config):
    """Run the builder and be killed at the `call`-th renaming of a file or folder, before it happens."""
    torch.set_num_threads(1)
    rename, calls = os.replace, iter(range(1000))

    def replace_or_die(source, target):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace_or_die
    main(config)


def test_kill_9_at_any_moment_then_the_same_command_gives_the_identical_dataset(workplace):
    """The moments: nothing written, a block half written, later ones, the export about to be put in place."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_builders.text_to_image_pairs"])
    folder = workplace / "killed"

    def killed_at(call):
        child = context.Process(target=die_at, args=(call, settings(workplace, "killed")))
        child.start()
        child.join(600)
        assert child.exitcode == -signal.SIGKILL
        return len(blocks_of(folder))

    assert [killed_at(call) for call in (0, 2, 1, 1)] == [0, 1, 2, 3], "finished blocks are kept"
    assert len(list((folder / "work" / "images-0").glob(".block-*"))) == 3, "what was half written lies about"
    assert not (folder / "pairs").exists()
    main(settings(workplace, "killed"))
    assert generated(folder) == 3, "the images of the last block"
    assert_identical(folder, workplace / "whole")
    assert killed_at(0) == BLOCKS
    assert_identical(folder, workplace / "whole")
    assert killed_at(1) == BLOCKS
    with pytest.raises(InputError, match="killed: a builder ended while it replaced these tables"):
        read_preferences(str(folder), config="pairs")
    main(settings(workplace, "killed"))
    assert generated(folder) == 0
    assert_identical(folder, workplace / "whole")


def test_a_crash_of_the_export_leaves_nothing_half_made(workplace, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writers.pq.ParquetWriter, "write_table", full)
        with pytest.raises(InputError, match=r"could not write .*whole: No space left"):
            main(settings(workplace, "whole"))
    assert list((workplace / "whole" / "pairs").iterdir()), "the old pairs stay"
    main(settings(workplace, "whole"))
    assert [path for path in (workplace / "whole").iterdir() if path.name.startswith(".")] == []
