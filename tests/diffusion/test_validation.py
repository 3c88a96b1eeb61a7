"""Images while a model trains: the same seeds each time, at no cost to what is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import logged, train
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.lora import load_adapter
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE

PROMPTS = ["two red lions", "one $blue$ <zebra> at night"]


@pytest.fixture(scope="module")
def shown(setting, tmp_path_factory):
    """A run with images every two steps, and the same run without."""
    folder = tmp_path_factory.mktemp("validation")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    options = {"validation_prompts": str(folder / "prompts.txt"), "validation_steps": 2}
    options |= {"validation_inference_steps": 3, "report_to": "tensorboard", "lora_dropout": 0.2}
    train(setting, folder / "shown", **options)
    train(setting, folder / "plain", lora_dropout=0.2)
    return folder / "shown", folder / "plain", options


def images_of(run, step):
    arrays = []
    for file in sorted((run / "validation" / f"step-{step:06d}").iterdir()):
        with Image.open(file) as image:
            arrays.append(np.asarray(image))
    return arrays


def test_images_are_of_the_start_of_every_n_steps_and_of_the_end(shown):
    run, _, _ = shown
    steps = sorted(path.name for path in (run / "validation").iterdir() if path.is_dir())
    assert steps == ["step-000000", "step-000002", "step-000004", "step-000005"]
    assert all(len(images_of(run, step)) == 2 for step in (0, 2, 4, 5))
    with Image.open(run / "validation" / "strips.png") as strips:
        assert strips.width > 300


def test_an_image_is_what_the_weights_of_its_step_generate(shown, setting):
    run, _, _ = shown
    pipeline = load_pipeline(setting["model_name_or_path"])
    before = list(sample(pipeline, PROMPTS, [0, 1], Sampler(3, 3.0)))
    load_adapter(pipeline, run / ADAPTER_FILE)
    after = list(sample(pipeline, PROMPTS, [0, 1], Sampler(3, 3.0)))
    for step, expected in ((0, before), (5, after)):
        for image, one in zip(images_of(run, step), expected, strict=True):
            np.testing.assert_allclose(image.astype(int), np.asarray(one).astype(int), atol=1)
    assert any((a != b).any() for a, b in zip(images_of(run, 0), images_of(run, 5), strict=True))


def test_a_run_with_images_trains_the_same_weights(shown):
    run, plain, _ = shown
    assert logged(run) == logged(plain)
    first, second = (load_file(folder / ADAPTER_FILE) for folder in (run, plain))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_tensorboard_has_them(shown):
    run, _, _ = shown
    (events,) = {path.parent for path in run.rglob("events.out.tfevents*")}
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["images"]
    assert [tag.partition(" ")[2] for tag in sorted(tags)] == PROMPTS
    assert [event.step for event in accumulator.Images(tags[0])] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (None, {}, "no prompts file"),
        ("a\n\nb\n", {}, "line 2 is empty"),
        ("a\n", {"validation_steps": 0}, "--validation_steps is 0"),
        ("a\n", {"validation_guidance_scale": -1.0}, "--validation_guidance_scale is -1.0"),
        ("a\n", {"fsdp": "full_shard"}, "FSDP"),
    ],
)
def test_prompts_that_cannot_be_shown_are_refused_at_once(setting, tmp_path, content, options, said):
    path = Path(tmp_path, "prompts.txt")
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        train(setting, tmp_path / "run", validation_prompts=str(path), **options)
