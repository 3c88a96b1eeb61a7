"""The pairs builder: stages, reasons, the same dataset from any number of processes and after a crash."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from data_builders import shards
from data_builders.candidates import (
    BETWEEN,
    NO_MARGIN,
    SAME_IMAGE,
    TOO_FEW,
    candidate_seed,
    encode,
    expand,
    rank,
    score,
    select,
)
from data_builders.export import export_pairs
from data_builders.prompts import distinct, identify, pocket_captions, read_prompts
from data_builders.shards import PAIRS, in_test
from data_builders.stages import flow
from data_builders.text_to_image_pairs import TextToImagePairsConfig, main
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.pocket.world import parse, train_scenes
from prefopt.records import InputError, read_pairs

SCRIPT = Path(__file__).parents[1] / "data_builders" / "text_to_image_pairs.py"
PROMPTS = [f"{number} red lions" for number in ("no", "two", "three", "four", "five", "six", "seven")]
BLOCKS = 4


def redness(images, prompts):
    """A scorer: how red an image is, if the prompt names its blue."""
    colours = [np.asarray(image)[0, 0] for image in images]
    assert [f"blue {blue}" for _, _, blue in colours] == list(prompts)
    return np.array([red for red, _, _ in colours], dtype=np.float32)


def painted(colours):
    """The stage in place of `draw`: candidates get the next (red, blue); None: not finite."""
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
    stages = [expand(range(candidates), 0), painted(colours), encode(2, ahead=3), score(redness, 2), rank]
    return list(flow(identify(prompts), [*stages, select(min_margin)]))


def test_stages_compose_and_a_dropped_record_carries_its_reason():
    """Guards against SRT2I's captions zipped with sorted files: a dropped image shifts nobody's prompt."""
    colours = [(50, 40), None, (90, 40), (70, 40), (60, 80), (0, 0), (20, 80), (60, 80)]
    rows = judged(["blue 40", "blue 80"], colours, candidates=4)
    assert [row["rank"] for row in rows] == [3, None, 1, 2, 1, None, 3, 1]
    assert [row["selected"] for row in rows] == [True, False, True, False, True, False, True, False]
    reasons = ["", "not finite", "", BETWEEN, "", "black", "", BETWEEN]
    assert [row["reject_reason"] for row in rows] == reasons
    assert rows[1].get("image") is None and rows[5]["image"] is not None
    with Image.open(io.BytesIO(rows[2]["image"]["bytes"])) as image:
        assert image.format == "WEBP" and image.getpixel((3, 3)) == (90, 0, 40)
    assert rows[4]["pixels_sha256"] == rows[7]["pixels_sha256"] != rows[6]["pixels_sha256"]


def test_a_tie_gives_no_pair():
    """Guards against AGFSync's winner and loser that are one image; and against a margin of nothing."""
    tied = judged(["blue 9"], [(50, 9)] * 3, candidates=3)
    assert {row["reject_reason"] for row in tied} == {NO_MARGIN} and {row["rank"] for row in tied} == {1}
    close = judged(["blue 9"], [(50, 9), (52, 9)], candidates=2, min_margin=3)
    assert {row["reject_reason"] for row in close} == {NO_MARGIN}
    assert all(row["selected"] for row in select(2.0)(close)), "a selection is decided anew"
    alone = judged(["blue 9"], [(50, 9), (0, 0)], candidates=2)
    assert [row["reject_reason"] for row in alone] == [TOO_FEW, "black"]
    same = [row | {"pixels_sha256": "same"} for row in close]
    assert {row["reject_reason"] for row in select(0.0)(same)} == {SAME_IMAGE}


def test_a_score_that_is_not_finite_drops_its_candidate():
    stages = [expand(range(3), 0), painted([(1, 1), (20, 1), (30, 1)]), encode(1, ahead=1)]
    scored = flow(identify(["x"]), [*stages, score(lambda images, _: np.full(len(images), np.nan), 8), rank])
    assert [row["reject_reason"] for row in select(0.0)(scored)] == ["black"] + ["score not finite"] * 2


def test_a_seed_depends_on_seed_prompt_and_candidate_alone():
    assert candidate_seed(0, "a red lion", 1) == 0x13650BEC, "seeds on disk mean what they meant"
    seeds = {candidate_seed(s, p, c) for s in range(5) for p in ("a", "b", "a 1") for c in range(20)}
    assert len(seeds) == 300 and all(0 <= seed < 2**32 for seed in seeds)
    rows = list(expand(range(3), 7)(identify(["a", "b"])))
    assert [row["seed"] for row in rows[3:]] == [candidate_seed(7, "b", i) for i in range(3)]


def test_prompts_come_from_a_file_and_duplicates_are_counted(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa lion\r\nzwei L\u00f6wen \u2028 am See\na lion \nsnow\n".encode())
    dropped = Counter()
    records = list(flow(identify(read_prompts(str(file), None, 0)), [distinct(dropped)]))
    assert [record["prompt"] for record in records] == ["a lion", "zwei L\u00f6wen \u2028 am See", "snow"]
    assert dropped == {"duplicate": 1} and len({record["prompt_id"] for record in records}) == 3
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
    figures = export_pairs(rows, tmp_path / "pairs", test_fraction=0.3, max_bytes=8 * size)
    test = [prompt for prompt in prompts if in_test(rows[3 * prompts.index(prompt)]["prompt_id"], 0.3)]
    assert 0 < len(test) < 30 and figures.pairs == {"test": len(test), "train": 30 - len(test)}
    assert len(list((tmp_path / "pairs").glob("train-*.parquet"))) >= (30 - len(test)) // 5
    for split, expected in (("test", test), ("train", [p for p in prompts if p not in test])):
        table = read_pairs(str(tmp_path / "pairs"), split=split)
        assert table.facts["prompt"][:] == expected and not table.dropped
        for i, content in enumerate(table.images(0)):
            with Image.open(io.BytesIO(content)) as image:
                assert image.convert("RGB").getpixel((0, 0))[0] == (90, 20)[i]
    assert set(table.rows.features) == set(PAIRS)
    export_pairs(rows, tmp_path / "pairs", test_fraction=0.0, max_bytes=2**20)
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
        clip_model_name_or_path=str(folder / "clip"),
        num_inference_steps=2,
        batch_size=4,
        block_size=2,
        test_fraction=0.4,
        output_dir=str(folder / output),
    )
    return replace(config, **changes)


def build_of(folder):
    return json.loads((folder / "BUILD.json").read_text())


def candidates_of(folder):
    files = sorted((folder / "candidates").glob("block-*.parquet"))
    return [row for file in files for row in pq.read_table(file).drop(["seconds"]).to_pylist()]


def assert_identical(folder, other):
    assert candidates_of(folder) == candidates_of(other)
    assert [p.name for p in (folder / "candidates").iterdir() if p.name.startswith(".")] == []
    names = sorted(path.name for path in (folder / "pairs").iterdir())
    assert names == sorted(path.name for path in (other / "pairs").iterdir()) and len(names) == 2
    for name in names:
        assert (folder / "pairs" / name).read_bytes() == (other / "pairs" / name).read_bytes()
    figures, others = build_of(folder)["figures"], build_of(other)["figures"]
    timing = {"seconds_drawing": 0}
    assert figures | timing == others | timing and build_of(folder)["dropped"] == build_of(other)["dropped"]


def test_a_build_is_whole_and_says_what_it_did(workplace):
    folder = workplace / "whole"
    rows, build = candidates_of(folder), build_of(folder)
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert build["figures"]["prompts"] == 7 and build["figures"]["candidates"] == len(rows) == 21
    assert build["dropped"]["prompts"]["duplicate"] == 1
    assert build["run"]["blocks"] == build["run"]["blocks_drawn"] == BLOCKS and build["run"]["processes"] == 1
    pairs = build["figures"]["pairs"]
    assert sum(pairs.values()) == sum(row["selected"] for row in rows) / 2 == 7
    assert all(row["height"] == row["width"] == 16 and row["model_identity"] for row in rows)
    card = (folder / "README.md").read_text()
    assert "7 pairs of 7 prompts" in card and "1 duplicate" in card
    for split, count in pairs.items():
        table = read_pairs(str(folder / "pairs"), split=split)
        assert len(table) == count
        for row in table.rows.remove_columns(["chosen", "rejected"]):
            scores = [r["clip_score"] for r in rows if r["prompt"] == row["prompt"]]
            assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
            assert row["margin"] == pytest.approx(max(scores) - min(scores), abs=1e-5)


def test_a_candidate_can_be_drawn_again_alone(workplace):
    pipeline = load_pipeline(workplace / "sd")
    for row in candidates_of(workplace / "whole")[4:6]:
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        again = next(sample(pipeline, [row["prompt"]], [row["seed"]], **{name: row[name] for name in names}))
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert np.abs(np.asarray(again, int) - np.asarray(image.convert("RGB"))).max() <= 1


def test_the_same_command_draws_nothing_twice_and_a_selection_needs_no_drawing(workplace, monkeypatch):
    monkeypatch.setattr("data_builders.sources.load_pipeline", None)
    folder = workplace / "whole"
    before = candidates_of(folder)
    margins = pq.read_table(folder / "pairs", columns=["margin"])["margin"].to_pylist()
    main(settings(workplace, "whole", min_margin=sorted(margins)[3], test_fraction=0.0))
    build = build_of(folder)
    assert build["run"]["blocks_drawn"] == 0 and build["figures"]["pairs"] == {"train": 4}
    assert build["dropped"]["prompts"] == {"duplicate": 1, NO_MARGIN: 3}
    dropped = [row for row in candidates_of(folder) if row["reject_reason"] == NO_MARGIN]
    assert len(dropped) == 9 and not any(row["selected"] for row in dropped)
    with pytest.raises(InputError, match=r"7 prompts, 21 candidates and no pair .*7 no margin"):
        main(settings(workplace, "whole", min_margin=1000.0))
    main(settings(workplace, "whole"))
    assert candidates_of(folder) == before


def test_more_prompts_draw_only_the_new_blocks(workplace):
    main(settings(workplace, "grown", num_prompts=4))
    assert build_of(workplace / "grown")["run"]["blocks_drawn"] == 2
    main(settings(workplace, "grown"))
    assert build_of(workplace / "grown")["run"]["blocks_drawn"] == 2
    assert_identical(workplace / "grown", workplace / "whole")


def test_other_settings_in_the_folder_are_an_error_that_names_both_sides(workplace, tmp_path):
    for changes, message in (
        ({"seed": 5}, "its seed is 0, this run's is 5"),
        ({"guidance_scale": 1.0}, "its guidance_scale is 3.0, this run's is 1.0"),
        (
            {"model_name_or_path": tiny.tiny_stable_diffusion(tmp_path / "other", seed=1)},
            "its model_identity",
        ),
        ({"adapter": tiny.tiny_adapter(workplace / "sd", tmp_path / "lora")}, "its adapter_identity is None"),
        ({"clip_model_name_or_path": tiny.tiny_clip(tmp_path / "clip", seed=1)}, "its scorer_identity"),
    ):
        with pytest.raises(InputError, match=f"{message}.*Name another --output_dir"):
            main(settings(workplace, "whole", **changes))
    (tmp_path / "prompts.txt").write_text("something else\nand more")
    with pytest.raises(InputError, match="holds 4 blocks of other prompts"):
        main(settings(workplace, "whole", prompts=str(tmp_path / "prompts.txt")))
    with pytest.raises(InputError, match="nowhere"):
        main(settings(workplace, "whole", model_name_or_path=str(tmp_path / "nowhere")))


def test_without_arguments_the_pocket_draws_160_of_its_captions():
    assert TextToImagePairsConfig().prompts == "pocket" and TextToImagePairsConfig().num_prompts == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, "--candidates is 1; it is 2 or more"),
        ({"min_margin": float("nan")}, "--min_margin is nan"),
        ({"test_fraction": 1.0}, "--test_fraction"),
        ({"height": 12}, "--height is 12; it is a multiple of 8"),
        ({"prompts": None}, "--prompts is missing"),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path, changes, message):
    (tmp_path / "sd").mkdir()
    with pytest.raises(InputError, match=message):
        settings(tmp_path, "bad", **changes)


def test_a_damaged_block_is_named(workplace):
    main(settings(workplace, "damaged", num_prompts=2))
    block = next((workplace / "damaged" / "candidates").glob("block-*.parquet"))
    block.write_bytes(block.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{block.name} cannot be read.*Delete it"):
        main(settings(workplace, "damaged", num_prompts=2))


def test_two_processes_make_the_identical_dataset(workplace):
    """By path, as a user starts it; the world size is the one that the processes saw."""
    config = settings(workplace, "two")
    names = ("prompts", "candidates", "model_name_or_path", "clip_model_name_or_path", "num_inference_steps")
    names = (*names, "batch_size", "block_size", "test_fraction", "output_dir")
    flags = [word for name in names for word in (f"--{name}", str(getattr(config, name)))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*command, SCRIPT, *flags], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    assert build_of(workplace / "two")["run"]["processes"] == 2
    assert build_of(workplace / "two")["run"]["blocks_drawn"] == BLOCKS
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
        return len(list((folder / "candidates").glob("block-*.parquet")))

    assert [killed_at(call) for call in (0, 2, 1, 1)] == [0, 1, 2, 3], "finished blocks are kept"
    assert len(list((folder / "candidates").glob(".block-*"))) == 3, "what was half written lies about"
    assert not (folder / "pairs").exists()
    main(settings(workplace, "killed"))
    assert build_of(folder)["run"]["blocks_drawn"] == BLOCKS - 3
    assert_identical(folder, workplace / "whole")
    assert killed_at(0) == BLOCKS and not (folder / "pairs").exists()
    main(settings(workplace, "killed"))
    assert build_of(folder)["run"]["blocks_drawn"] == 0
    assert_identical(folder, workplace / "whole")


def test_a_crash_of_the_export_leaves_nothing_half_made(workplace, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards.pq, "write_table", full)
        with pytest.raises(InputError, match=r"could not write .*whole: No space left"):
            main(settings(workplace, "whole"))
    assert list((workplace / "whole" / "pairs").iterdir()), "the old pairs stay"
    main(settings(workplace, "whole"))
    assert [path for path in (workplace / "whole").iterdir() if path.name.startswith(".")] == []
