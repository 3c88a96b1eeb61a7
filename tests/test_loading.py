"""Models by name: none is used with weights that are missing, and none with the pocket's data unasked."""

import shutil
from pathlib import Path

import pytest
import tiny
from huggingface_hub import constants
from launching import ROOT
from running import recipe
from safetensors.torch import load_file, save_file
from tiny_vlm import tiny_llava

from data_builders.self_rewarding import SelfRewardingConfig
from data_builders.text_to_image_pairs import TextToImagePairsConfig
from prefopt.cli import parse
from prefopt.diffusion.sampling import load_pipeline
from prefopt.errors import InputError
from prefopt.evaluation.scorers import clip_scorer
from prefopt.judges.clip import ClipScorer
from prefopt.loading import files_identity
from prefopt.vlm.models import load_vlm


def without_a_tensor(source: str, folder: Path, file: str) -> str:
    """A copy of a model's folder whose weights lack their first tensor."""
    shutil.copytree(source, folder)
    weights = load_file(folder / file)
    del weights[sorted(weights)[0]]
    save_file(weights, folder / file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_that_lacks_weights_is_refused(stable_diffusion, tmp_path, part):
    """Guards: what a file lacks is filled in at random, with no more than a warning."""
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    broken = without_a_tensor(stable_diffusion, tmp_path / "broken", f"{part}/{name}.safetensors")
    with pytest.raises(InputError, match=rf"no pipeline's {part} could be loaded from .*lack 1 tensors"):
        load_pipeline(broken)


def test_a_vlm_and_a_clip_that_lack_weights_are_refused(tmp_path):
    llava = tiny_llava(tmp_path / "llava")
    with pytest.raises(InputError, match="lack 1 tensors"):
        load_vlm(without_a_tensor(llava, tmp_path / "broken", "model.safetensors"))
    clip = tiny.tiny_clip(tmp_path / "clip")
    with pytest.raises(InputError, match="lack 1 tensors"):
        ClipScorer(without_a_tensor(clip, tmp_path / "mute", "model.safetensors"))


def test_a_vlm_is_no_clip(tmp_path):
    """Guards: a LLaVA given as CLIP, scored with at random, and reported as a gain."""
    llava = tiny_llava(tmp_path / "llava")
    with pytest.raises(InputError, match="no CLIP"):
        clip_scorer(llava).score([], [])


def test_an_identity_is_the_files_and_loads_nothing(tmp_path, monkeypatch):
    folders = [tiny.tiny_clip(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    again = tiny.tiny_clip(tmp_path / "again", seed=0)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    first, other = map(files_identity, folders)
    assert first == files_identity(again) != other


def test_the_identity_of_a_hub_id_is_its_commit(tmp_path, monkeypatch):
    """Guards: a repository that has changed, whose old answers are served; a model that does not exist."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--org--judge" / "refs"
    refs.mkdir(parents=True)
    found = set()
    for commit in ("a" * 40, "b" * 40):
        (refs / "main").write_text(commit)
        found.add(files_identity("org/judge"))
    assert found == {f"org/judge at {'a' * 40}", f"org/judge at {'b' * 40}"}
    assert files_identity("org/judge", "c" * 40) == f"org/judge at {'c' * 40}"
    for name in ("org/no-such-judge", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="no model could be loaded from"):
            files_identity(name)


def missing(config: type, **options: object) -> str:
    with pytest.raises(InputError) as error:
        config(**options)
    return str(error.value)


def test_a_real_model_gets_no_data_of_the_pockets(stable_diffusion, tmp_path):
    """Guards: DPO of another model that trains on the pocket's pictures unasked."""
    out = {"model_name_or_path": stable_diffusion, "output_dir": str(tmp_path / "run")}
    (tmp_path / "prompts.txt").write_text("a lion\n")
    prompts = {"prompts": str(tmp_path / "prompts.txt")}
    for name, config in (("diffusion_dpo", "DiffusionDPOConfig"), ("diffusion_sft", "DiffusionSFTConfig")):
        assert "--dataset_name is missing" in missing(getattr(recipe(name), config), **out)
    compare = recipe("compare_text_to_image").CompareConfig
    assert "--prompts is missing" in missing(compare, **out)
    assert "--clip_model_name_or_path is missing" in missing(compare, **out, **prompts)
    assert "--prompts is missing" in missing(TextToImagePairsConfig, **out)
    assert "--judge_model_name_or_path is missing" in missing(TextToImagePairsConfig, **out, **prompts)
    assert "--judge_model_name_or_path is missing" in missing(SelfRewardingConfig, **out)
    out["judge_model_name_or_path"] = "some/judge"
    assert "--writer_model_name_or_path is missing" in missing(SelfRewardingConfig, **out)
    assert "--detector is missing" in missing(SelfRewardingConfig, **out, **prompts)
    sources = {"sources": ["pocket", "org/model steps=1"], "output_dir": out["output_dir"]}
    for config, option in (
        (TextToImagePairsConfig, "prompts"),
        (SelfRewardingConfig, "judge_model_name_or_path"),
    ):
        message = missing(config, **sources)
        assert f"--{option} is missing" in message and "not org/model" in message
    pocket = SelfRewardingConfig()
    assert pocket.judge_model_name_or_path == pocket.writer_model_name_or_path == pocket.detector == "pocket"


def test_the_sd21_preset_needs_a_dataset():
    preset = str(ROOT / "recipes/configs/diffusion_dpo_sd21.yaml")
    with pytest.raises(InputError, match="--dataset_name is missing: only the model `pocket` has a default"):
        parse(recipe("diffusion_dpo").DiffusionDPOConfig, ["--config", preset])
