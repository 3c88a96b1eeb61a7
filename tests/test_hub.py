"""Adapters by name: folders, files whatever they are called, hub ids, and files of hub ids."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from httpx import Request, Response
from httpx2 import ConnectError
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from running import recipe
from safetensors.torch import load_file
from small_adapters import deltas_of, save_random
from tiny import tiny_adapter
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, tiny_llava

from data_builders.images.config import parse_source
from data_builders.prompts.captions import parse_sources
from prefopt.adapters import POLICY, adapter_folder
from prefopt.averaging import average_adapters
from prefopt.config import LoraArguments
from prefopt.diffusion.generator import Generator, adapter_file
from prefopt.diffusion.lora import LOADED, make_trainable
from prefopt.diffusion.sampling import load_generator, load_pipeline
from prefopt.errors import InputError
from prefopt.evaluation.systems import VlmSystem, vlm_systems
from prefopt.hub import ADAPTER_FILE
from prefopt.options import check_paths_exist
from prefopt.vlm.models import add_lora, load_vlm, start_from_lora

NOT_FOUND = Response(404, request=Request("GET", "https://hub"))
Hub = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A hub of local folders; hub(id, folder) puts a folder there, and returns what is downloaded of it."""
    repositories: dict[str, Path] = {}

    def download(name: str, wanted: Callable[[str], bool]) -> Path:
        if name not in repositories:
            raise RepositoryNotFoundError(f"404: there is no {name}", response=NOT_FOUND)
        snapshot = tmp_path / "snapshots" / name
        for file in repositories[name].iterdir():
            if wanted(file.name):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot)
        return snapshot

    def put(name: str, folder: str | Path) -> Path:
        repositories[name] = Path(folder)
        return tmp_path / "snapshots" / name

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: str(
            download(name, lambda file: any(fnmatch(file, pattern) for pattern in allow_patterns))
        ),
    )
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda name, file: str(download(name, lambda other: other == file) / file),
    )
    monkeypatch.setattr(
        "huggingface_hub.list_repo_files",
        lambda name: [*(file.name for file in repositories[name].iterdir()), "other/x.safetensors"],
    )
    return put


@pytest.fixture
def lora(stable_diffusion: str, tmp_path: Path) -> Path:
    """The file of a random adapter, alone in its folder."""
    return Path(tiny_adapter(stable_diffusion, tmp_path / "lora"), ADAPTER_FILE)


def test_the_only_safetensors_file_of_a_folder_is_the_adapter(lora: Path) -> None:
    assert adapter_file(lora.parent) == adapter_file(lora) == lora
    named = lora.rename(lora.with_name("my_lora.safetensors"))
    assert adapter_file(str(lora.parent)) == adapter_file(named) == named
    shutil.copy(named, lora.with_name("b.safetensors"))
    message = r"lora holds 2 safetensors files, b.safetensors, my_lora.safetensors: name .*lora/b.safetensors"
    with pytest.raises(InputError, match=message):
        adapter_file(lora.parent)
    shutil.copy(named, lora)
    assert adapter_file(lora.parent) == lora, "the name that diffusers writes comes first"


def test_a_folder_without_an_adapter_is_named(stable_diffusion: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter in .*: it holds no pytorch_lora_weights.safetensors"):
        adapter_file(tmp_path)
    with pytest.raises(InputError, match=r"is a whole pipeline, not an adapter: it holds model_index.json"):
        adapter_file(stable_diffusion)


def test_a_hub_id_is_downloaded_no_more_than_needed(hub: Hub, lora: Path) -> None:
    shutil.copy(lora, lora.with_name("another.safetensors"))
    snapshot = hub("org/lora", lora.parent)
    assert adapter_file("org/lora") == snapshot / ADAPTER_FILE
    assert [file.name for file in snapshot.iterdir()] == [ADAPTER_FILE]
    assert adapter_file("org/lora/another.safetensors") == snapshot / "another.safetensors"
    lora.unlink()
    snapshot = hub("org/mine", lora.parent)
    assert adapter_file("org/mine") == snapshot / "another.safetensors"
    shutil.copy(snapshot / "another.safetensors", lora.with_name("b.safetensors"))
    with pytest.raises(
        InputError, match=r"2 safetensors files, another.safetensors, b.safetensors: .*org/two"
    ):
        hub("org/two", lora.parent)
        adapter_file("org/two")


def test_a_wrong_hub_id_is_named(hub: Hub) -> None:
    for name in ("org/nothing", "org/nothing/x.safetensors", "nowhere"):
        with pytest.raises(
            InputError, match=rf"no adapter '{name}': no such folder or file is here, and as a"
        ):
            adapter_file(name)
        with pytest.raises(InputError, match=rf"no adapter '{name}': .*404: there is no"):
            adapter_folder(name)


def test_a_missing_path_whose_first_folder_is_here_is_no_hub_id(
    hub: Hub, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/x", "runs/x/my.safetensors", "./nowhere"):
        hub(name.removesuffix("/my.safetensors"), lora.parent)
    assert adapter_file("runs/x").is_file(), "without a folder `runs` it is a hub id"
    (tmp_path / "runs").mkdir()
    for name in ("runs/x", "runs/x/my.safetensors", "./nowhere"):
        for find in (adapter_file, adapter_folder):
            with pytest.raises(InputError, match=f"there is no {name} here"):
                find(name)
        with pytest.raises(InputError, match=f"--systems: there is no {name} here"):
            vlm_systems(["base", f"x={name}"], VlmSystem("pocket"))
        with pytest.raises(InputError, match=f"--adapter_name_or_path: there is no {name}"):
            check_paths_exist(LoraArguments(adapter_name_or_path=name), "adapter_name_or_path")
    with pytest.raises(InputError, match="there is no runs/diffusion_dpo here"):
        recipe("compare_text_to_image").CompareConfig()


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), ConnectError("no route")])
def test_a_downloaded_adapter_of_any_name_is_found_without_the_hub(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.list_repo_files", unreachable)
    with pytest.raises(InputError, match=r"no adapter 'org/mine': .*as a hub id it could not be loaded"):
        adapter_file("org/mine")
    repository, commit = tmp_path / "cache" / "models--org--mine", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(lora, snapshot / "mine.safetensors")
    assert adapter_file("org/mine") == snapshot / "mine.safetensors"
    shutil.copy(lora, snapshot / "b.safetensors")
    with pytest.raises(InputError, match=r"org/mine holds 2 safetensors files, b\.safetensors, mine"):
        adapter_file("org/mine")


def test_diffusion_trains_on_and_compares_from_a_hub_id(hub: Hub, lora: Path, stable_diffusion: str) -> None:
    hub("org/lora", lora.rename(lora.with_name("my_lora.safetensors")).parent)
    expected = deltas_of(load_generator(Generator(stable_diffusion, str(lora.parent))).unet, LOADED)
    pipeline = load_pipeline(stable_diffusion)
    make_trainable(pipeline.unet, pipeline, LoraArguments(adapter_name_or_path="org/lora"), ["to_q"])
    found = deltas_of(pipeline.unet, POLICY)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    compare = recipe("compare_text_to_image").CompareConfig
    given = {
        "model_name_or_path": stable_diffusion,
        "prompts": __file__,
        "clip_model_name_or_path": "org/clip",
    }
    config = compare(**given, systems=["base", "hub=org/lora guidance=5", f"here={lora.parent}"])
    by_hub, here = (config.families[name][name] for name in ("hub", "here"))
    assert (by_hub.adapter, by_hub.sampler.guidance_scale) == ("org/lora", 5)
    assert by_hub.weights == here.weights, "the same content has one identity, wherever it lies"
    with pytest.raises(InputError, match=r"no adapter 'org/nothing'"):
        compare(**given, systems=["base", "x=org/nothing"])


def test_sources_take_hub_ids(hub: Hub, lora: Path, stable_diffusion: str) -> None:
    hub("org/lora", lora.parent)
    base = Generator(stable_diffusion)
    source = parse_source("adapter=org/lora scale=0.5", base)
    (other,) = parse_sources(["a caption=raw adapter=org/lora scale=0.5"], base)
    assert source.weights == other.generator.weights
    assert (source.adapter, source.weights["scale"]) == ("org/lora", 0.5)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)
def test_vision_language_adapters_take_hub_ids(hub: Hub, tmp_path: Path) -> None:
    llava = tiny_llava(tmp_path / "llava")
    trained = add_lora(load_vlm(llava)[0], LoraArguments(lora_r=2, lora_alpha=4, lora_dropout=0.0))
    trained.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"pickle")
    snapshot = hub("org/adapter", tmp_path / "adapter")
    policy = start_from_lora(load_vlm(llava)[0], "org/adapter")
    assert {file.name for file in snapshot.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in saved.items():
        factor = f"{name.removesuffix('.weight')}.{POLICY}.weight"
        assert torch.equal(policy.get_parameter(factor), value)
    with pytest.raises(InputError, match=r"no adapter 'org/nothing': .*as a hub id it could not be loaded"):
        start_from_lora(load_vlm(llava)[0], "org/nothing")
    hub("org/no-adapter", llava)
    with pytest.raises(
        InputError, match=r"org/no-adapter is no adapter in peft's format: it has no adapter_con"
    ):
        start_from_lora(load_vlm(llava)[0], "org/no-adapter")
    systems = vlm_systems(["base", "x=org/adapter"], VlmSystem(llava))
    assert systems["x"] == VlmSystem(llava, adapter="org/adapter")


def test_adapters_of_the_hub_are_averaged_in_either_format(hub: Hub, lora: Path, tmp_path: Path) -> None:
    hub("org/diffusion", lora.rename(lora.with_name("my_lora.safetensors")).parent)
    hub("org/peft", save_random(tmp_path / "peft", target_modules=["narrow"], r=2, lora_alpha=2))
    for name in ("org/diffusion", "org/peft"):
        average = average_adapters([name, name], tmp_path / f"average of {Path(name).name}", rank=2)
        assert average.rank == 2 and average.energy == pytest.approx(1)
