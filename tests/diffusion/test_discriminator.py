"""The discriminator: its losses by hand, whose gradient goes where, frozen and trained along, as a judge."""

import io
import json
import math

import datasets
import numpy as np
import pytest
import torch
from launching import launch, torchrun
from pictures import png
from PIL import Image
from running import logged, train
from safetensors.torch import load_file, save_file
from tiny import WIDTH

from prefopt import strips
from prefopt.diffusion.discriminating import STEP, DiscriminatorScore, calibrate
from prefopt.diffusion.discriminator import (
    FOLDER,
    DiscriminatedDenoiser,
    Discriminator,
    latents_identity,
    load_discriminator,
)
from prefopt.diffusion.families import family_of
from prefopt.diffusion.lora import WEIGHTS_FILE
from prefopt.diffusion.sampling import load_pipeline
from prefopt.errors import InputError
from prefopt.evaluation.discrimination import calibration_error, discrimination, ordered_strip
from prefopt.hub import ADAPTER_FILE
from prefopt.judges.loading import load_judge
from prefopt.judges.questions import Case
from prefopt.judges.rubric import Rubric
from prefopt.losses import discriminator_loss, realism_loss
from prefopt.objectives import Scored, discriminating, supervised, with_discriminator

CPO = "recipes/diffusion_cpo.py"


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.fixture(scope="module")
def folder(stable_diffusion, tmp_path_factory) -> str:
    """A random discriminator of the tiny pipeline's latents."""
    pipeline = load_pipeline(stable_diffusion)
    torch.manual_seed(0)
    of = {"latents": latents_identity(pipeline, family_of(pipeline)), "base_model": str(stable_diffusion)}
    model = Discriminator(4, WIDTH, (8, 12), **of)
    path = tmp_path_factory.mktemp("discriminators") / "one"
    path.mkdir()
    model.save_pretrained(path)
    return str(path)


# Losses


def test_losses_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, 0.0]], dtype=torch.float64)
    real = torch.tensor([[True, False, False], [True, False, False]])
    there = torch.tensor([[True, True, True], [False, True, False]])
    first = 0.5 * softplus(-2.0) + 0.5 * (softplus(-1.0) + softplus(0.5)) / 2
    torch.testing.assert_close(
        discriminator_loss(logits, real, there), torch.tensor([first, softplus(3.0)]).double()
    )
    assert discriminator_loss(logits, real, torch.zeros_like(there)).tolist() == [0, 0]
    assert realism_loss(logits)[0, 0].item() == pytest.approx(softplus(-2.0), rel=1e-12)


def test_the_term_is_a_mean_over_real_candidates_and_needs_its_extra():
    objective = with_discriminator(supervised(), 0.5)
    assert objective.needs == {"nll", "realism_loss"}
    batch = {"ranks": torch.tensor([[1, 2, 0]]), "mask": torch.tensor([[True, True, False]])}
    scored = Scored(torch.zeros(1, 3), torch.ones(1, 3), realism_loss=torch.tensor([[1.0, 3.0, 9.0]]))
    loss = objective(scored, None, batch)
    assert loss.losses.item() == 1 + 0.5 * 2 and loss.terms["discriminator/term"].item() == 2
    trained = objective(scored._replace(discriminator_loss=torch.tensor([0.25])), None, batch)
    assert trained.losses.item() == 2.25 and trained.terms["discriminator/loss"].item() == 0.25


def test_the_penalty_is_the_squared_gradient_at_real_images():
    """Of a linear function the difference along the noise is exact; over noises its mean is the square."""
    weight = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))

    class Linear(torch.nn.Module):
        def forward(self, latents, text):
            return (latents * weight).sum((1, 2, 3))

    chance = torch.Generator().manual_seed(1)
    count = 4000
    batch = {
        "latents": torch.randn(count, 2, 4, 4, 4, generator=chance),
        "noise": torch.randn(count, 4, 4, 4, generator=chance),
        "ranks": torch.tensor([[1, 2]]).expand(count, 2),
        "conditioning": {"embeddings": torch.zeros(count, 1, 1)},
    }
    scored = DiscriminatorScore(r1_gamma=3.0)(Linear(), batch)
    slopes = (batch["noise"] * weight).sum((1, 2, 3))
    torch.testing.assert_close(scored.penalty, 1.5 * slopes.square(), rtol=2e-3, atol=1e-2)
    assert scored.penalty.mean().item() == pytest.approx(1.5 * weight.square().sum().item(), rel=0.1)
    assert scored.scores.shape == (count, 2) and STEP == 0.01
    loss = discriminating()(scored, None, batch)
    assert loss.losses.mean() > scored.penalty.mean()


def test_spectral_weights_have_singular_value_one_without_any_state():
    torch.manual_seed(0)
    model = Discriminator(4, WIDTH, (8, 12), spectral=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH)
    assert torch.equal(model(latents, text), model(latents, text))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in (model.enter, model.blocks[0].first, model.query):
        assert torch.linalg.matrix_norm(layer.used_weight.flatten(1), 2).item() == pytest.approx(1, abs=0.15)


# In the denoiser


def parts(model: str, folder: str, **options) -> tuple[DiscriminatedDenoiser, dict]:
    pipeline = load_pipeline(model)
    denoiser = DiscriminatedDenoiser(pipeline, discriminator=load_discriminator(folder, pipeline), **options)
    chance = torch.Generator().manual_seed(3)
    batch = {
        "latents": torch.randn(2, 3, 4, 8, 8, generator=chance),
        "noise": torch.randn(2, 4, 8, 8, generator=chance),
        "time": torch.tensor([0.1, 0.8]),
        "conditioning": {"embeddings": torch.randn(2, 77, WIDTH, generator=chance)},
        "mask": torch.tensor([[True, True, True], [True, True, False]]),
    }
    return denoiser, batch


def test_each_loss_has_its_gradient_where_it_belongs(stable_diffusion, folder):
    denoiser, batch = parts(stable_diffusion, folder, adversarial=True, window=(0.0, 0.5))
    scored = denoiser(**batch)
    assert (scored.realism_loss[0] > 0).all() and not scored.realism_loss[1].any(), "0.8 is outside"
    of = {name: list(getattr(denoiser, name).parameters()) for name in ("unet", "discriminator")}

    def reached(loss: torch.Tensor) -> set[str]:
        found = {
            name: torch.autograd.grad(loss.sum(), p, retain_graph=True, allow_unused=True)
            for name, p in of.items()
        }
        return {
            name for name, gradients in found.items() if any(g is not None and g.any() for g in gradients)
        }

    assert reached(scored.realism_loss) == {"unet"}
    assert reached(scored.discriminator_loss) == {"discriminator"}
    assert scored.discriminator_loss[1] == 0
    frozen, _ = parts(stable_diffusion, folder)
    assert not any(p.requires_grad for p in frozen.discriminator.parameters())
    assert frozen(**batch).discriminator_loss is None
    torch.testing.assert_close(frozen(**batch).scores, scored.scores)


# Files, and what does not fit


def test_a_saved_discriminator_gives_the_same_logits(folder, tmp_path):
    model = load_discriminator(folder)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH)
    expected = model(latents, text)
    calibrated = torch.tensor([[4.0, -6.0], [5.0, -9.0], [-1.0, -3.0]])
    calibrate(model, calibrated, torch.tensor([[1, 2]]).expand(3, 2))
    model.save_pretrained(tmp_path)
    again = load_discriminator(str(tmp_path))
    scale, shift = again.config["scale"], again.config["shift"]
    torch.testing.assert_close(again(latents, text), scale * expected + shift)
    before = discriminator_loss(calibrated, torch.tensor([[True, False]]), torch.ones(3, 2, dtype=torch.bool))
    after = discriminator_loss(
        scale * calibrated + shift, torch.tensor([[True, False]]), torch.ones(3, 2, dtype=torch.bool)
    )
    assert after.mean() < before.mean()


def test_one_that_is_not_finite_or_of_other_latents_is_an_error(stable_diffusion_v, folder, tmp_path):
    weights = load_file(f"{folder}/{WEIGHTS_FILE}")
    weights["leave.bias"][0] = torch.nan
    save_file(weights, tmp_path / WEIGHTS_FILE)
    (tmp_path / "config.json").write_text(json.dumps(load_discriminator(folder).config))
    with pytest.raises(InputError, match=r"values that are not finite in .* the tensor leave"):
        load_discriminator(str(tmp_path))
    pipeline = load_pipeline(stable_diffusion_v)
    with torch.no_grad():
        pipeline.vae.quant_conv.weight.mul_(2)
    with pytest.raises(InputError, match="its VAE or text encoder are others"):
        load_discriminator(folder, pipeline)
    with pytest.raises(InputError, match="no discriminator could be loaded"):
        load_discriminator(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"discriminator_weight": -0.1}, "--discriminator_weight is -0.1"),
        ({"discriminator_window": [0.5, 0.2]}, "--discriminator_window 0.5 0.2: name its two ends"),
        ({"discriminator_mode": "adversarial"}, "name one with --discriminator_name_or_path"),
    ],
)
def test_options_out_of_range_are_errors(setting, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        train(setting, tmp_path / "run", "diffusion_cpo", **options)


# Runs


@pytest.fixture(scope="module")
def adversarial(setting, folder) -> dict:
    """A run of CPO with a discriminator that is trained along, from lists of unequal length."""
    term = {"discriminator_name_or_path": folder, "discriminator_weight": 0.5, "discriminator_window": [0, 1]}
    more = {"discriminator_mode": "adversarial", "discriminator_learning_rate": 1e-2}
    return {**setting, **term, **more, "per_device_train_batch_size": 2, "max_steps": 6}


def test_killed_the_discriminator_is_bit_identical_too(adversarial, tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 2}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    running = launch(CPO, {**adversarial, **keep, "output_dir": whole}, tmp_path / "log")
    assert running.wait() == 0, running.text()
    same = {**adversarial, **keep, "output_dir": folder, "resume_from_checkpoint": None}
    running = launch(CPO, same, tmp_path / "log")
    running.wait_until(lambda: len(logged(folder)) >= 3 if (folder / "metrics.jsonl").exists() else False)
    running.kill()
    running = launch(CPO, same, tmp_path / "log")
    assert running.wait() == 0, running.text()
    for file in (ADAPTER_FILE, f"{FOLDER}/{WEIGHTS_FILE}"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert logged(whole, "discriminator/loss") == logged(folder, "discriminator/loss")


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(adversarial, tmp_path):
    # By default Adam makes whole steps of the rounding in gradients that are zero, as those of a key's bias.
    options = {**adversarial, "adam_epsilon": 1e-5}
    one = {**options, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "one"}
    running = launch(CPO, one, tmp_path / "log-one")
    assert running.wait() == 0, running.text()
    torchrun(CPO, {**options, "output_dir": tmp_path / "two"})
    for file in (ADAPTER_FILE, f"{FOLDER}/{WEIGHTS_FILE}"):
        first, second = (load_file(tmp_path / run / file) for run in ("one", "two"))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_discriminator_trains_by_path_and_is_tested(setting, tmp_path):
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "ranks": datasets.List(datasets.Value("int32")),
        }
    )
    (tmp_path / "data").mkdir()
    for split, count in (("train", 6), ("test", 4)):
        rows = [
            {"prompt": f"a {i}", "images": [{"bytes": png(9 * i + j)} for j in range(3)], "ranks": [1, 2, 3]}
            for i in range(count)
        ]
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = {
        "model_name_or_path": setting["model_name_or_path"],
        "dataset_name": tmp_path / "data",
        "widths": [8, 12],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "output_dir": tmp_path / "run",
    }
    running = launch("recipes/discriminator.py", options, tmp_path / "log")
    assert running.wait() == 0, running.text()
    figures = json.loads((tmp_path / "run" / "test.json").read_text())
    assert figures["lists"] == 2 and 0 <= figures["accuracy"]["mean"] <= 1
    assert (tmp_path / "run" / "test.png").exists()
    judge = load_judge(str(tmp_path / "run"), rubric=Rubric.load("reward"))
    (question,) = Rubric.load("reward").questions("", "")
    image = Image.open(io.BytesIO(png(0))).convert("RGB")
    ((one,), (two,)) = judge.answer([Case(image, "a 0", (question,)), Case(image, "a 1", (question,))])
    assert math.isfinite(one.log_odds) and one.log_odds != two.log_odds, "it reads the text"


# Figures


def test_figures_of_a_discriminator_by_hand():
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, -1.0], [1.0, 1.0, 0.0]])
    ranks = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 0]])
    found = discrimination(logits, ranks)
    assert found["accuracy"]["mean"] == pytest.approx((2 + 1 + 0.5) / 5)
    assert found["spearman"] == pytest.approx((1 + 0.5) / 2), "the list of two has no order to speak of"
    sure = calibration_error(np.array([0.95, 0.95, 0.05, 0.05]), np.array([True, True, False, False]))
    assert sure == pytest.approx(0.05)
    assert calibration_error(np.array([0.95, 0.95]), np.array([True, False])) == pytest.approx(0.45)


def test_strips_show_the_images_by_their_logits_with_the_real_one_framed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        strips.Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.touch()
    )
    images = [[Image.new("RGB", (8, 8), (10 * i + j, 0, 0)) for j in range(3)] for i in range(2)]
    logits = np.array([[1.0, 3.0, 2.0], [5.0, -1.0, 9.0]])
    ranks = np.array([[1, 2, 3], [1, 2, 0]])
    rows = [ordered_strip(*row) for row in zip(images, logits, ranks, strict=True)]
    strips.draw_strips(tmp_path / "strips.png", ["a $x$ <lion>", "word " * 99], rows)
    (figure,) = drawn
    first, second = figure.subfigs
    assert first.get_suptitle() == "a $x$ <lion>" and second.get_suptitle().endswith(" ...")
    assert [axis.get_title() for axis in first.axes] == ["rank 2  +3.0", "rank 3  +2.0", "real  +1.0"]
    assert [axis.get_title() for axis in second.axes] == ["real  +5.0", "rank 2  -1.0", ""]
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in first.axes] == [1, 2, 0]
    assert [len(axis.patches) for axis in first.axes] == [0, 0, 1]
