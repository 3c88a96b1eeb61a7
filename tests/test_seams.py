"""Where new things enter: a judge, an export, an objective, a family, each in at most 25 lines."""

import inspect
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import UNet2DConditionModel
from running import logged, train

from data_builders.engine.tables import SFT
from data_builders.export.tables import EXPORTS, Export
from data_builders.text_to_image_pairs import TextToImagePairsConfig, main
from prefopt.diffusion.families import FAMILIES
from prefopt.diffusion.families.stable_diffusion import StableDiffusion
from prefopt.diffusion.sampling import load_pipeline
from prefopt.judges.questions import NO, YES, Answer
from prefopt.loading import Lazy
from prefopt.objectives import OBJECTIVES, Loss, Objective


def settings(tmp_path, model, **options):
    (tmp_path / "prompts.txt").write_text("a lion\ntwo zebras\n")
    given = {"model_name_or_path": model, "prompts": str(tmp_path / "prompts.txt"), "num_inference_steps": 1}
    given |= {"judge_model_name_or_path": "mine", "output_dir": str(tmp_path / "built"), "candidates": 3}
    return TextToImagePairsConfig(**given | options)


def test_a_judge(stable_diffusion, tmp_path):
    class Darkness:
        """Prefers the darker image."""

        def answer(self, cases):
            means = [np.asarray(case.image).mean() / 255 for case in cases]
            return [[Answer({YES: 1 - mean, NO: mean})] for mean in means]

    main(settings(tmp_path, stable_diffusion), Lazy("darkness", Darkness))
    rows = pq.read_table(tmp_path / "built" / "candidates").to_pylist()
    darkest = [row for row in rows if row["rank"] == 1]
    assert len(rows) == 6 and len(darkest) == 2
    for row in darkest:
        others = [other for other in rows if other["prompt"] == row["prompt"]]
        assert row["log_odds"][0] == max(other["log_odds"][0] for other in others)
    pairs = pq.read_table(tmp_path / "built" / "pairs").to_pylist()
    assert {pair["chosen_seed"] for pair in pairs} == {row["seed"] for row in darkest}


def test_an_export(stable_diffusion, tmp_path, monkeypatch):
    def worst(group):
        yield from group.ranked[-1:]

    monkeypatch.setitem(EXPORTS, "worst", Export("the last image of each prompt", SFT, worst))

    class Judge:
        def answer(self, cases):
            return [[Answer({YES: p, NO: 1 - p})] for p in np.linspace(0.1, 0.9, len(cases))]

    main(settings(tmp_path, stable_diffusion, exports=["worst"]), Lazy("judge", Judge))
    rows = pq.read_table(tmp_path / "built" / "worst").to_pylist()
    candidates = pq.read_table(tmp_path / "built" / "candidates").to_pylist()
    assert [row["seed"] for row in rows] == [row["seed"] for row in candidates if row["rank"] == 3]
    assert "the last image of each prompt" in (tmp_path / "built" / "README.md").read_text()


def test_an_objective(setting, tmp_path, monkeypatch):
    def exponential(options, beta):
        """exp(-beta D), D the margin over the reference."""

        def compute(scored, reference, batch):
            rewards = beta * (scored.scores - reference)
            return Loss((rewards[:, 1] - rewards[:, 0]).exp(), rewards.detach())

        return Objective(compute)

    monkeypatch.setitem(OBJECTIVES, "exponential", exponential)
    train(setting, tmp_path, loss_type="exponential", beta_dpo=2, max_steps=3)
    losses = logged(tmp_path)
    assert losses[0] == pytest.approx(1.0, abs=1e-6)  # exp(0): policy and reference are equal
    assert losses[1] != losses[0] and logged(tmp_path, "rewards/accuracies")[0] == 0.5


def test_a_family_like_stable_diffusion(stable_diffusion, setting, tmp_path, monkeypatch):
    class LearnedVariance(StableDiffusion):
        """A network that predicts the noise and, in four more channels, its variance."""

        lora_targets = ("to_q", "to_v")

        def prediction(self, output):
            return output[0].chunk(2, dim=1)[0]

    monkeypatch.setitem(FAMILIES, "StableDiffusionPipeline", LearnedVariance())
    pipeline = load_pipeline(stable_diffusion)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, out_channels=8)
    pipeline.save_pretrained(tmp_path / "model")
    cache = str(tmp_path / "cache")
    model = str(tmp_path / "model")
    trainer = train(setting, tmp_path / "run", model_name_or_path=model, cache_dir=cache, max_steps=2)
    losses = logged(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    assert any("to_v" in name for name, _ in trainer.model.named_parameters() if "lora_B" in name)
    assert not any("to_k" in name for name, _ in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    "addition", [test_a_judge, test_an_export, test_an_objective, test_a_family_like_stable_diffusion]
)
def test_each_takes_at_most_25_lines(addition):
    assert len(inspect.getsource(addition).splitlines()) <= 25
