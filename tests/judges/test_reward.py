"""Reward models as judges: CLIP and ImageReward against plain forward passes, and a build judged by one."""

import json
import logging
import os
import pickle
import runpy
import sys
from math import sqrt, tanh
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from launching import ROOT, launch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import BertTokenizer, CLIPModel, CLIPProcessor

from data_builders.self_rewarding import SelfRewardingConfig, main
from prefopt import pocket
from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.evaluation.options import JudgeOptions
from prefopt.judges.image_reward import ImageRewardScorer
from prefopt.judges.loading import load_judge
from prefopt.judges.questions import Case, Question
from prefopt.judges.reward import RewardJudge
from prefopt.judges.rubric import Rubric
from prefopt.pocket.world import caption, held_out_scenes, render

RUBRIC = Rubric.load("reward")
ASKED = RUBRIC.questions("", "")
PROMPTS = ("a red lion", "two zebras in the snow", "a red lion", "a lion at night , and one more zebra")
WORDS = (
    "a",
    "red",
    "lion",
    "two",
    "zebras",
    "zebra",
    "in",
    "the",
    "snow",
    "at",
    "night",
    "and",
    "one",
    "more",
    ",",
)
SIDE = 32  # pixels that the tiny ImageReward sees


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = (picture(0), picture(1, 100, 30), picture(2, 60, 64), picture(3, 30, 50))


def case(image, prompt, questions=ASKED):
    return Case(image, prompt, questions)


CASES = [case(image, prompt) for image, prompt in zip(PICTURES, PROMPTS, strict=True)]


def rewards(judge, cases) -> np.ndarray:
    return np.array([answer.log_odds for (answer,) in judge.answer(cases)])


# An ImageReward with the published names, in small, and what it computes, written out


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors by the names and in the order of axes of the published checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    wide, hidden, vision, text = 128, 96, "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{vision}.cls_token": (1, 1, wide),
        f"{vision}.pos_embed": (1, 17, wide),
        f"{vision}.patch_embed.proj": (wide, 3, 8, 8),
        f"{vision}.norm": (wide,),
        f"{text}.embeddings.word_embeddings.weight": (len(WORDS) + 7, wide),
        f"{text}.embeddings.position_embeddings.weight": (40, wide),
        f"{text}.embeddings.LayerNorm": (wide,),
        "blip.vision_proj": (8, wide),
        "blip.text_proj": (8, wide),
    }
    for i in range(2):
        shapes |= {
            f"{vision}.blocks.{i}.norm1": (wide,),
            f"{vision}.blocks.{i}.attn.qkv": (3 * wide, wide),
            f"{vision}.blocks.{i}.attn.proj": (wide, wide),
            f"{vision}.blocks.{i}.norm2": (wide,),
            f"{vision}.blocks.{i}.mlp.fc1": (hidden, wide),
            f"{vision}.blocks.{i}.mlp.fc2": (wide, hidden),
            f"{text}.encoder.layer.{i}.intermediate.dense": (hidden, wide),
            f"{text}.encoder.layer.{i}.output.dense": (wide, hidden),
            f"{text}.encoder.layer.{i}.output.LayerNorm": (wide,),
        }
        for attention in ("attention", "crossattention"):
            within = f"{text}.encoder.layer.{i}.{attention}"
            shapes |= {f"{within}.self.{name}": (wide, wide) for name in ("query", "key", "value")}
            shapes |= {f"{within}.output.dense": (wide, wide), f"{within}.output.LayerNorm": (wide,)}
    widths = (wide, 24, 16, 8, 4, 1)
    shapes |= {f"mlp.layers.{n}": (widths[i + 1], widths[i]) for i, n in enumerate((0, 2, 4, 6, 7))}
    weights = {f"{text}.embeddings.position_ids": torch.arange(40)[None]}
    for name, shape in shapes.items():
        spread = 2 / sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        if name.endswith(("token", "embed", "weight")):
            weights[name] = torch.randn(shape, generator=generator)
        else:
            weights[f"{name}.weight"] = spread * torch.randn(shape, generator=generator) + (len(shape) == 1)
            weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return weights


def reference(weights: dict[str, torch.Tensor], image: Image.Image, prompt: str) -> float:
    """The reward of one image by the published names, in float64 and without any padding."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name, eps):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attention(q, k, v):
        heads = [torch.stack(tensor.split(64, dim=-1)) for tensor in (q, k, v)]
        return torch.cat(tuple(functional.scaled_dot_product_attention(*heads)), dim=-1)

    scale = SIDE / min(image.size)
    size = [int(length * scale) for length in image.size]
    left, top = ((length - SIDE) // 2 for length in size)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    pixels = torch.from_numpy(((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1))

    blip = "blip.visual_encoder"
    patch = f"{blip}.patch_embed.proj"
    x = functional.conv2d(pixels[None], weights[f"{patch}.weight"], weights[f"{patch}.bias"], stride=8)
    x = torch.cat([weights[f"{blip}.cls_token"], x.flatten(2).transpose(1, 2)], dim=1)
    x = (x + weights[f"{blip}.pos_embed"])[0]
    for i in range(2):
        block = f"{blip}.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attention(*qkv), f"{block}.attn.proj")
        within = functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(within, f"{block}.mlp.fc2")
    seen = norm(x, f"{blip}.norm", 1e-6)

    blip = "blip.text_encoder"
    ids = [2, *(5 + WORDS.index(word) for word in prompt.split()), 3]
    y = weights[f"{blip}.embeddings.word_embeddings.weight"][ids]
    y = y + weights[f"{blip}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(y, f"{blip}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{blip}.encoder.layer.{i}"
        for name, source in (("attention", None), ("crossattention", seen)):
            at = f"{layer}.{name}"
            keys = y if source is None else source
            q, k, v = (
                linear(of, f"{at}.self.{n}") for of, n in ((y, "query"), (keys, "key"), (keys, "value"))
            )
            y = norm(linear(attention(q, k, v), f"{at}.output.dense") + y, f"{at}.output.LayerNorm", 1e-12)
        within = functional.gelu(linear(y, f"{layer}.intermediate.dense"))
        y = norm(linear(within, f"{layer}.output.dense") + y, f"{layer}.output.LayerNorm", 1e-12)
    reward = y[0]
    for number in (0, 2, 4, 6, 7):
        reward = linear(reward, f"mlp.layers.{number}")
    return float((reward - 0.16717362830052426) / 1.0333394966054072)


def converted(source: Path, folder: Path, tokenizer: Path, monkeypatch) -> int:
    script = str(ROOT / "scripts" / "convert_image_reward.py")
    monkeypatch.setattr(sys, "argv", [script, str(source), str(folder), "--tokenizer", str(tokenizer)])
    return runpy.run_path(script)["main"]()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a published checkpoint in small, its tokenizer, and what the script makes of both."""
    folder = tmp_path_factory.mktemp("rewards")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "tokenizer")
    save_file(published(), folder / "ImageReward.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        assert (
            converted(folder / "ImageReward.safetensors", folder / "blip", folder / "tokenizer", patched) == 0
        )
    tiny.tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def clip():
    judge = load_judge(str(pocket.folder("clip")))
    assert isinstance(judge, RewardJudge)
    return judge


# CLIP, and whoever has its shape


@pytest.mark.parametrize("which", ["tiny", "pocket"])
def test_a_clip_s_log_odds_are_its_logits(workplace, which):
    folder = str(workplace / "clip") if which == "tiny" else str(pocket.folder("clip"))
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    text = {"padding": True, "truncation": True, "return_tensors": "pt"}
    inputs = processor(text=list(PROMPTS), images=list(PICTURES), **text)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    assert np.ptp(expected.numpy()) > 0.1  # not all alike, or equality would say little
    for batch_size in (1, 3, 8):
        judge = load_judge(folder, batch_size=batch_size)
        np.testing.assert_allclose(rewards(judge, CASES), expected, atol=1e-4)
    backwards = rewards(judge, CASES[::-1])
    np.testing.assert_allclose(backwards[::-1], expected, atol=1e-4)


def test_the_picture_of_the_prompt_s_own_scene_is_ranked_first(clip):
    scenes = held_out_scenes()[::6]
    pictures = [render(scene, seed) for seed, scene in enumerate(scenes)]
    firsts = 0
    for place, scene in enumerate(scenes):
        scores = rewards(clip, [case(image, caption(scene, place)) for image in pictures])
        firsts += int(scores.argmax()) == place
    assert len(scenes) == 20 and firsts >= 19


def test_soft_scores_order_as_rewards_do_where_tanh_is_flat(clip):
    """In float32, too, in which they are written."""
    scenes = held_out_scenes()
    ties = 0
    for scene in scenes[:20:4]:
        images = [render(scene, seed) for seed in range(8)] + [render(other, 0) for other in scenes[:12]]
        cases = [case(image, caption(scene, 0)) for image in images]
        cases.append(case(Image.new("RGB", (64, 64), (128, 128, 128)), caption(scene, 0)))
        answers = clip.answer(cases)
        r = np.array([answer.log_odds for (answer,) in answers])
        empty = {"preferred": answers[-1][0]}
        soft = [sum(RUBRIC.soft_points({"preferred": one}, empty).values()) for (one,) in answers]
        np.testing.assert_allclose(soft, r - r[-1], atol=1e-9)
        written = np.float32(soft)
        assert len(set(written.tolist())) == len(set(r.tolist()))
        assert np.argsort(written, kind="stable").tolist() == np.argsort(r, kind="stable").tolist()
        squashed = [tanh(d / 2) for d in soft]
        ties += len(set(r.tolist())) - len(set(squashed))
    assert ties > 5  # or `soft: log_odds` would not be needed


def test_the_identity_is_the_weights(workplace, tmp_path):
    judges = [
        load_judge(str(workplace / "clip")),
        load_judge(tiny.tiny_clip(tmp_path / "other", seed=1)),
        load_judge(str(workplace / "blip")),
    ]
    assert len({judge.identity for judge in judges}) == 3
    for folder, judge in (("clip", judges[0]), ("blip", judges[2])):
        assert load_judge(str(workplace / folder), batch_size=2).identity == judge.identity
    folder = tmp_path / "blip"
    folder.mkdir()
    for file in (workplace / "blip").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["head.4.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_judge(str(folder)).identity != judges[2].identity


# ImageReward


def test_a_converted_image_reward_gives_the_published_number(workplace):
    expected = [reference(published(), one.image, one.prompt) for one in CASES]
    assert np.ptp(expected) > 0.1
    for batch_size in (1, 3, 8):
        judge = load_judge(str(workplace / "blip"), batch_size=batch_size)
        np.testing.assert_allclose(rewards(judge, CASES), expected, atol=1e-3)
    others = [case(one.image, CASES[i - 1].prompt) for i, one in enumerate(CASES)]
    expected = [reference(published(), one.image, one.prompt) for one in others]
    np.testing.assert_allclose(rewards(judge, others), expected, atol=1e-3)


def test_the_folder_says_what_the_checkpoint_s_shapes_say(workplace):
    config = json.loads((workplace / "blip" / "config.json").read_text())
    assert config["model_type"] == "image_reward" and config["head_sizes"] == [128, 24, 16, 8, 4, 1]
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["image_size"], vision["patch_size"], vision["num_attention_heads"]) == (SIDE, 8, 2)
    assert (text["vocab_size"], text["num_attention_heads"]) == (len(WORDS) + 7, 2)
    weights = load_file(workplace / "blip" / "model.safetensors")
    assert len(weights) == len(published()) - 5  # without two projections and the places' numbers
    assert sum(map(torch.numel, weights.values())) < sum(map(torch.numel, published().values()))


def test_a_long_prompt_is_cut_with_a_count(workplace, caplog):
    scorer = ImageRewardScorer(str(workplace / "blip"))
    long = " ".join(["lion"] * 40)
    with caplog.at_level(logging.WARNING):
        found = scorer.rewards([PICTURES[0]] * 3, [long, f"{long} snow", "a lion"])
    assert "2 of 3 prompts are longer than ImageReward's 35 tokens" in caplog.text
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        scorer.rewards([PICTURES[0]], ["a", "b"])
    assert scorer.rewards([], []).shape == (0,)


class Trap:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_checkpoint_that_is_no_image_reward_is_refused_and_not_run(
    workplace, tmp_path, monkeypatch, capsys
):
    weights = published()
    torch.save({"state": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    torch.save({"state": Trap(tmp_path / "sprung")}, tmp_path / "named.safetensors")
    save_file({"mlp.layers.0.weight": torch.zeros(1, 2)}, tmp_path / "part.safetensors")
    save_file(weights | {"blip.text_decoder.bias": torch.zeros(1)}, tmp_path / "more.safetensors")
    messages = {
        "trap.pt": "a .pt is not read",
        "plain.pt": "a .pt is not read",
        "named.safetensors": "cannot be read as safetensors",
        "part.safetensors": "are not those of an ImageReward",
        "more.safetensors": "text_decoder",
        "missing.safetensors": "cannot be read as safetensors",
    }
    for name, message in messages.items():
        assert converted(tmp_path / name, tmp_path / "folder", workplace / "tokenizer", monkeypatch) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / name} " in said and message in said, said
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "folder").exists()
    source = workplace / "ImageReward.safetensors"
    assert converted(source, tmp_path / "folder", tmp_path / "nowhere", monkeypatch) == 2
    assert f"--tokenizer {tmp_path / 'nowhere'} cannot be read" in capsys.readouterr().err


def test_weights_that_lack_a_tensor_are_refused(workplace, tmp_path):
    for file in (workplace / "blip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.4.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors of a ImageRewardModel, head\.4\.bias"):
        load_judge(str(tmp_path))


# What cannot be asked


MORE = Question("realistic", "Does the light look real?")
WRONG = {
    "another question": ((MORE,), "not the predicate 'realistic'; take --rubric reward"),
    "two questions": ((*ASKED, MORE), "take --rubric reward"),
    "one question twice": (ASKED * 2, "2 questions would all get the same answer"),
    "a choice": ((Question("preferred", "Which?", "choice", ("a", "b")),), "not the choice 'preferred'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_questions_that_a_reward_cannot_answer_are_errors(clip, what):
    questions, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        clip.answer([CASES[0], case(PICTURES[0], "a lion", questions)])


def test_no_cases_and_no_questions(clip):
    assert clip.answer([]) == []
    nothing = case(PICTURES[0], "a lion", ())
    assert [len(answers) for answers in clip.answer([nothing, CASES[0], nothing])] == [0, 1, 0]


def test_what_is_no_reward_model_is_named(workplace, tmp_path):
    with pytest.raises(InputError, match=r"ImageReward\.pt is a pickle.*convert_image_reward\.py"):
        load_judge("ImageReward.pt")
    with pytest.raises(InputError, match=r"float32, not in torch\.bfloat16"):
        load_judge(str(workplace / "clip"), dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"config\.json is not there"):
        RewardJudge(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        InputError, match=r"is no folder or hub id of a reward model.*'clip' or 'image_reward'"
    ):
        RewardJudge(str(tmp_path))


# A build


def test_a_build_judged_by_a_clip(workplace, stable_diffusion, tmp_path):
    (tmp_path / "prompts.txt").write_text("one red elephant in the snow\ntwo blue giraffes at night\n")
    options = {
        "prompts": tmp_path / "prompts.txt",
        "model_name_or_path": stable_diffusion,
        "candidates": 4,
        "num_inference_steps": 1,
        "judge_model_name_or_path": pocket.folder("clip"),
        "rubric": "reward",
        "detector": "none",
        "output_dir": tmp_path / "built",
    }
    refused = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    with pytest.raises(InputError, match="'preferred', not the predicate 'realistic'; take --rubric reward"):
        main(SelfRewardingConfig(**refused | {"rubric": "class_conditional"}))
    assert not list((tmp_path / "built" / "work").rglob("block-*")), "it generated before it said so"

    running = launch("data_builders/self_rewarding.py", options, tmp_path / "output")
    assert running.wait() == 0, running.text()
    rows = pq.read_table(tmp_path / "built" / "candidates").to_pylist()
    assert len(rows) == 8
    for group in (rows[:4], rows[4:]):
        for row in group:
            assert row["questions"] == ["preferred"]
            assert row["soft_score"] == pytest.approx(row["log_odds"][0] - row["empty_log_odds"][0], abs=1e-5)
        by_reward = sorted(group, key=lambda row: -row["log_odds"][0])
        assert [row["rank"] for row in by_reward] == [1, 2, 3, 4]
        assert [row["selected"] for row in by_reward] == [True, False, False, False]
    assert len(read_sft(str(tmp_path / "built" / "sft"))) == 2
    assert len(read_preferences(str(tmp_path / "built" / "pairs"))) == 2
    pair = pq.read_table(tmp_path / "built" / "pairs").to_pylist()[0]
    by_seed = {row["seed"]: row["log_odds"][0] for row in rows}
    assert pair["margin"] == pytest.approx(
        by_seed[pair["chosen_seed"]] - by_seed[pair["rejected_seed"]], abs=1e-5
    )


# Comparisons


@pytest.mark.parametrize("which", ["clip", "blip"])
def test_a_comparison_scores_by_any_reward_model(workplace, which):
    """Without a --rubric: its reward, in logits, for the images and prompts of a comparison."""
    folder = str(workplace / which)
    scorer = JudgeOptions(judge_model_name_or_path=folder).judge_scorer("cpu")
    expected = rewards(load_judge(folder), CASES)
    assert len(set(expected)) == len(CASES)
    np.testing.assert_allclose(scorer.score(list(PICTURES), list(PROMPTS)), expected, rtol=1e-5, atol=1e-6)
    assert "Is this a picture that a person who asked" in scorer.about and "in logits" in scorer.about
    with pytest.raises(InputError, match="is a reward model, which gives an image one number"):
        JudgeOptions(judge_model_name_or_path=folder, rubric="whole_prompt").judge_scorer("cpu")
