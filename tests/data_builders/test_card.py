"""Cards of datasets: what the hub reads, texts with any signs in them, and what an upload takes along."""

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builds import header_of

from data_builders.consensus_pairs import ConsensusConfig
from data_builders.discriminator_pairs import DiscriminatorPairsConfig
from data_builders.export import hub
from data_builders.export.card import Card, fenced, plain, public_words, write_about
from data_builders.self_critique import SelfCritiqueConfig
from data_builders.self_rewarding import SelfRewardingConfig
from data_builders.text_to_image_pairs import TextToImagePairsConfig
from prefopt.cli import parse
from prefopt.errors import InputError
from prefopt.judges.rubric import Rubric

CARD = Card(
    title="Images",
    about="By hand.",
    facts={"prompts": "3"},
    models={"judge": "clip"},
    tables={"pairs": "two images"},
    rows={"candidates": {"train": 8, "test": 2}, "pairs": {"train": 3}},
    tasks=["text-to-image"],
    license="unknown",
)
SIGNS = "a: b # \"c\" 'd'\n---\n- {e}|<b>&`f` [g](h) \N{SNOWMAN}: *i"


def written(card: Card, folder: Path) -> tuple[dict[str, Any], str]:
    """A card's first lines, parsed, and the text below them."""
    write_about(folder, {}, card)
    return header_of(folder), (folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]


def test_a_card_says_where_the_splits_of_each_table_are(tmp_path: Path) -> None:
    header, body = written(CARD, tmp_path)
    assert header == {
        "license": "unknown",
        "task_categories": ["text-to-image"],
        "tags": ["prefopt", "preference"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "candidates",
                "data_files": [
                    {"split": "train", "path": "candidates/train-*.parquet"},
                    {"split": "test", "path": "candidates/test-*.parquet"},
                ],
            },
            {
                "config_name": "pairs",
                "data_files": [{"split": "train", "path": "pairs/train-*.parquet"}],
                "default": True,
            },
        ],
    }
    assert body.startswith("\n# Images\n\n| | |\n|---|---|\n| prompts | 3 |\n")
    assert "| judge | clip |" in body and "| `pairs` | two images |" in body
    assert "## License\n\nUnknown: whoever publishes this dataset has to choose one" in body
    assert written(replace(CARD, license="cc-by-4.0"), tmp_path)[1].endswith("## License\n\ncc-by-4.0\n")


@pytest.mark.parametrize(
    ("rows", "default"),
    [
        ({"candidates": 4, "sft": 1, "ranked": 1, "pairs": 1}, "pairs"),
        ({"candidates": 4, "sft": 1, "ranked": 1, "pairs": 0}, "ranked"),
        ({"candidates": 4, "pickapic": 1}, "pickapic"),
        ({"candidates": 4}, "candidates"),
    ],
)
def test_the_table_to_train_on_is_the_default(rows: dict[str, int], default: str) -> None:
    card = replace(CARD, rows={name: {"train": count} for name, count in rows.items()})
    assert [config["config_name"] for config in card.header["configs"] if config.get("default")] == [default]
    assert [config["config_name"] for config in card.header["configs"]] == [n for n in rows if rows[n]]


def test_a_card_without_any_row_names_no_table(tmp_path: Path) -> None:
    header, body = written(replace(CARD, rows={"pairs": {}}), tmp_path)
    assert "configs" not in header and "load_dataset" not in body


@pytest.mark.parametrize(
    ("count", "category"),
    [
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (10**9, "1B<n<10B"),
    ],
)
def test_the_size_counts_all_rows(count: int, category: str) -> None:
    rows = {"pairs": {"train": count - 1, "test": 1}}
    assert replace(CARD, rows=rows).header["size_categories"] == [category]


def test_no_text_breaks_a_card(tmp_path: Path) -> None:
    """Guards: a name or a question that ends the first lines, a cell or a block, or that is HTML."""
    every: dict[str, Any] = {name: {SIGNS: SIGNS} for name in ("facts", "models", "tables", "questions")}
    card = replace(CARD, title=SIGNS, license=SIGNS, tags=[SIGNS], rows={SIGNS: {"train": 1}}, **every)
    header, body = written(card, tmp_path)
    assert header["license"] == header["tags"][-1] == header["configs"][0]["config_name"] == SIGNS
    shown = "a: b # \"c\" 'd' --- - {e}\\|&lt;b&gt;&amp;`f` [g](h) \N{SNOWMAN}: *i"
    assert plain(SIGNS) == shown and body.startswith(f"\n# {shown}\n")
    assert f"| {shown} | {shown} |\n" in body and f"```\n{SIGNS}\n```" in body
    assert fenced("a ```` b") == "`````\na ```` b\n`````"


def test_paths_say_nothing_of_the_machine(tmp_path: Path) -> None:
    assert public_words(f"{tmp_path}/sd steps=4 adapter={tmp_path}/runs/lora") == "sd steps=4 adapter=lora"
    assert public_words("stabilityai/sdxl-turbo guidance=0") == "stabilityai/sdxl-turbo guidance=0"


@pytest.mark.parametrize("name", ["class_conditional", "reward", "whole_prompt", "answers"])
def test_a_rubric_in_a_card_can_be_read_again(name: str, tmp_path: Path) -> None:
    rubric = Rubric.load(name)
    weighed = rubric.weighed([f"{rubric.items[-1].name}=4"])
    file = tmp_path / f"{name}.yaml"
    file.write_text(weighed.as_yaml(), encoding="utf-8")
    assert Rubric.load(str(file)) == weighed
    assert yaml.safe_load(weighed.as_yaml())[-1]["weight"] == 4


@pytest.mark.parametrize(
    "config",
    [
        ConsensusConfig,
        DiscriminatorPairsConfig,
        SelfCritiqueConfig,
        SelfRewardingConfig,
        TextToImagePairsConfig,
    ],
)
def test_every_builder_takes_a_license(config: type) -> None:
    assert parse(config, ["--license", "cc-by-4.0"]).license == "cc-by-4.0"
    with pytest.raises(InputError, match="--license 'CC BY': write it as the hub does"):
        parse(config, ["--license", "CC BY"])


def test_an_upload_takes_the_tables_and_leaves_what_computing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = ["BUILD.json", "README.md", "gallery.html", "imagefolder/train/000000.webp"]
    uploaded += ["imagefolder/train/metadata.jsonl", "pairs/test-00000.parquet", "pairs/train-00000.parquet"]
    left = [".lock", ".pairs/train-00000.parquet", ".README.md.0a", "cache/vae/0.safetensors"]
    left += ["work/answers-0.sqlite", "work/images-0/00000.parquet", "pairs/.train-00000.parquet.1"]
    for name in (*uploaded, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    calls: list[dict] = []

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            assert (repository, options) == ("me/animals", {"repo_type": "dataset", "exist_ok": True})

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(hub, "HfApi", Api)
    hub.push(tmp_path, "me/animals")
    (options,) = calls
    assert (options["repo_id"], options["repo_type"]) == ("me/animals", "dataset")
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    # As the hub's client filters them.
    kept = [
        n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in options["ignore_patterns"])
    ]
    assert sorted(kept) == sorted(uploaded)
    earlier = ["pairs/train-00007.parquet", "imagefolder/train/000009.webp", ".gitattributes", "notes.md"]
    earlier += ["data/train-00000.parquet", "mine.parquet", "mine/pairs/train-00000.parquet"]
    gone = [n for n in earlier if any(fnmatch.fnmatch(n, pattern) for pattern in options["delete_patterns"])]
    assert gone == earlier[:2]
