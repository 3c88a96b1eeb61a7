"""The comparison: same prompts and seeds for all, nothing generated twice, and an honest report."""

import json
import re
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
from builds import values
from launching import ROOT, arguments, torchrun
from PIL import Image
from servers import Scripted, chat

from prefopt.diffusion.generator import Generator, Sampler
from prefopt.errors import InputError
from prefopt.evaluation import text_to_image, words
from prefopt.evaluation.report import write_report
from prefopt.evaluation.scorers import Scorer, judge_scorer
from prefopt.evaluation.scoring import kept_scores
from prefopt.evaluation.stats import paired_bootstrap, win_rate
from prefopt.evaluation.text_to_image import compare
from prefopt.judges.critic_cases import CRITICS, ScoreCase, Templates
from prefopt.judges.discriminator import DiscriminatorScorer
from prefopt.judges.questions import Answer
from prefopt.judges.rubric import Rubric
from prefopt.ledger import Ledger
from prefopt.loading import Lazy

RECIPE = "recipes/compare_text_to_image.py"
PROMPTS = ["a red lion", "two <script>alert(1)</script> zebras", "snow & ice"]
SAMPLER = Sampler(num_inference_steps=2, guidance_scale=2.0)


class Brightness:
    """A scorer with an identity, which counts what it is asked."""

    def __init__(self):
        self.asked = 0

    def scorer(self, name="brightness"):
        return Scorer(name, f"{name} score", "how bright it is", self, identity="brightness 1")

    def __call__(self, images, prompts):
        self.asked += len(images)
        return np.array([np.asarray(image).mean() for image in images], dtype=np.float32)


def is_bright(images, prompts):
    bright = np.array([np.asarray(image).mean() > 127 for image in images])
    return {"red": bright, "all": bright & np.array(["red" in prompt for prompt in prompts])}


BRIGHT = Scorer("bright", "brightness rate", "whether it is bright", is_bright, "proportion", "all")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = tiny.tiny_stable_diffusion(folder / "sd")
    tiny.tiny_clip(folder / "clip")
    tiny.tiny_adapter(model, folder / "lora")
    (folder / "lora" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "loss": 0.7 - i / 100, "rewards/accuracies": 0.5, "error/chosen": 0.1})
            + "\n"
            for i in range(1, 9)
        )
    )
    return folder


def systems(models, *scales):
    base, lora = str(models / "sd"), str(models / "lora")
    adapted = {f"dpo at {scale:g}": Generator(base, lora, scale, sampler=SAMPLER) for scale in scales}
    return {"base": Generator(base, sampler=SAMPLER), **adapted}


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    scorers = [Brightness().scorer(), BRIGHT]
    summary = compare(systems(models, 0, 0.5, 1), PROMPTS, [3, 4], scorers, folder)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return folder, summary, rows


def scores(rows, system, metric="brightness"):
    return np.array([row["scores"][metric] for row in rows if row["system"] == system], dtype=float)


def test_every_system_draws_every_prompt_with_every_seed(compared):
    folder, summary, rows = compared
    pairs = [(prompt, 1000 * i + seed) for i, prompt in enumerate(PROMPTS) for seed in (3, 4)]
    for system in ("base", "dpo at 0", "dpo at 0.5", "dpo at 1"):
        assert [(row["prompt"], row["seed"]) for row in rows if row["system"] == system] == pairs
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["prompts"] == 3 and summary["seeds"] == 2
    assert {metric: told["kind"] for metric, told in summary["metrics"].items()} == {
        "brightness": "score",
        "bright/red": "proportion",
        "bright/all": "proportion",
    }
    assert {"torch", "diffusers", "python"} <= summary["versions"].keys()


def test_scale_0_is_the_base_and_shares_its_images(compared):
    folder, summary, rows = compared
    images = {name: [row["image"] for row in rows if row["system"] == name] for name in summary["systems"]}
    assert images["dpo at 0"] == images["base"] and not set(images["dpo at 1"]) & set(images["base"])
    assert len(list((folder / "images").iterdir())) == 18
    zero = summary["contrasts"][0]["metrics"]["brightness"]
    assert zero["wins"]["ties"] == 6 and zero["difference"]["mean"] == 0 and zero["groups_for_power"] is None


def test_the_summary_is_the_statistics_of_the_table(compared):
    _, summary, rows = compared
    base, dpo = scores(rows, "base"), scores(rows, "dpo at 1")
    contrast = summary["contrasts"][2]
    assert (contrast["system"], contrast["against"]) == ("dpo at 1", "base")
    entry = contrast["metrics"]["brightness"]
    assert entry["mean"] == summary["systems"]["dpo at 1"]["means"]["brightness"] == pytest.approx(dpo.mean())
    expected = paired_bootstrap(dpo, base, groups=np.repeat([1, 2, 0], 2))
    assert (entry["difference"]["mean"], entry["difference"]["groups"]) == (pytest.approx(expected.mean), 3)
    assert entry["difference"]["low"] == pytest.approx(expected.low, abs=0.05)
    wins = win_rate(dpo, base)
    assert entry["wins"]["wins"] == wins.wins and entry["wins"]["rate"] == wins.rate


def test_a_rerun_draws_nothing_and_asks_no_scorer_with_an_identity_again(
    models, compared, tmp_path, monkeypatch
):
    _, summary, _ = compared
    first = Brightness()
    compare(systems(models, 1), PROMPTS, [3, 4], [first.scorer()], tmp_path)
    assert first.asked == 12
    monkeypatch.setattr(text_to_image, "load_generator", lambda *a, **k: pytest.fail("generated again"))
    again = Brightness()
    repeated = compare(systems(models, 1), PROMPTS, [3, 4], [again.scorer()], tmp_path)
    assert again.asked == 0 and repeated["contrasts"][0]["metrics"].keys() == {"brightness"}
    assert (
        repeated["systems"]["base"]["means"]["brightness"]
        == summary["systems"]["base"]["means"]["brightness"]
    )


def test_an_image_that_is_missing_is_made_in_its_batch_again(models, tmp_path, monkeypatch):
    """Guards: the last bits of an image, which depend on the batch that it is made in."""
    compare(systems(models, 1), PROMPTS[:2], [3, 4], [Brightness().scorer()], tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    kept = {path: path.stat().st_mtime_ns for path in list(before)[1:]}
    missing, *_ = before
    missing.unlink()
    (tmp_path / "images" / ".a.webp.0123456789abcdef").write_text("what a killed run left")
    batches, sample = [], text_to_image.sample
    monkeypatch.setattr(text_to_image, "sample", lambda *a, **k: batches.append(len(a[1])) or sample(*a, **k))
    compare(systems(models, 1), PROMPTS[:2], [3, 4], [Brightness().scorer()], tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and batches == [4]


def test_a_further_system_draws_its_own_images_alone(models, tmp_path):
    scorer = Brightness()
    compare(systems(models, 1), PROMPTS[:2], [3], [scorer.scorer()], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    compare(systems(models, 1, 0.5), PROMPTS[:2], [3], [scorer.scorer()], tmp_path)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 2 and scorer.asked == 6


def test_the_identity_is_the_content_of_the_weights(models, tmp_path):
    model = Generator(tiny.tiny_stable_diffusion(tmp_path / "x"))
    other = Generator(tiny.tiny_stable_diffusion(tmp_path / "y", seed=1))
    assert model.weights == Generator(str(models / "sd")).weights
    assert model.weights != other.weights
    lora = Generator(model.model, str(models / "lora"), 0.5)
    assert lora.weights["model"] == model.weights["model"]
    assert lora.weights != model.weights


def test_what_cannot_be_compared_is_named(models, tmp_path):
    scorer = [Brightness().scorer()]
    with pytest.raises(InputError, match="2 prompts or more, not 1"):
        compare(systems(models, 1), PROMPTS[:1], [0], scorer, tmp_path)
    with pytest.raises(InputError, match="'a' is named twice among the prompts"):
        compare(systems(models, 1), ["a", "b", "a"], [0], scorer, tmp_path)
    with pytest.raises(InputError, match="2 systems or more"):
        compare(systems(models), PROMPTS, [0], scorer, tmp_path)
    with pytest.raises(InputError, match=r"no summary\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="the scorer odd gave"):
        odd = Scorer("odd", "odd", "one number for all", lambda images, prompts: np.zeros(1))
        compare(systems(models, 1), PROMPTS, [0], [odd], tmp_path)


def test_the_report_is_one_file_that_escapes_what_it_shows(models, compared):
    folder, _, _ = compared
    page = write_report(folder, runs=[models / "lora"]).read_text()
    assert page.count("<script") == 1 and "two &lt;script&gt;alert(1)&lt;/script&gt; zebras" in page
    assert set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)', page)) == {"blind.html", "prompts.csv"}
    assert not re.findall(r"url\((?!#)|@import|<link|<iframe", page)
    assert page.count("<svg") == 2 + 2 + 3  # win bars, one chart of scales each, training curves
    assert len(re.findall(r'\bid="([^"]+)"', page)) == len(set(re.findall(r'\bid="([^"]+)"', page)))
    assert write_report(folder, runs=[models / "lora"]).read_text() == page


def test_any_scorer_has_a_report_under_its_own_name_and_a_lower_loss_is_a_win(models, tmp_path):
    """Guards: a report that looks for a CLIP score, and takes every higher number for a gain."""
    darkness = Scorer("dark", "darkness loss", "how bright it is, which is bad", Brightness(), "loss")
    bright = Brightness().scorer("PickScore_v1")
    summary = compare(systems(models, 1), PROMPTS, [0, 1], [darkness, bright], tmp_path)
    gap = summary["contrasts"][0]["metrics"]
    assert gap["dark"]["wins"]["wins"] == gap["PickScore_v1"]["wins"]["losses"]
    assert gap["dark"]["difference"]["mean"] == pytest.approx(gap["PickScore_v1"]["difference"]["mean"])
    assert gap["dark"]["wins"]["wins"] + gap["dark"]["wins"]["losses"] > 0
    page = write_report(tmp_path).read_text()
    assert "darkness loss" in page and "PickScore_v1 score" in page and "CLIP" not in page


def test_hostile_names_of_systems_and_runs_stay_text(models, tmp_path):
    run = tmp_path / "<img src=x onerror=alert(1)>$x_$"
    run.mkdir()
    (run / "metrics.jsonl").write_text((models / "lora" / "metrics.jsonl").read_text())
    name = '"><script>alert(1)</script>$\\frac$'
    base = Generator(str(models / "sd"), sampler=SAMPLER)
    odd = replace(base, adapter=str(models / "lora"))
    scorer = Scorer("clip", "CLIP score", "an <img src=x>", Brightness())
    compare({"base": base, name: odd}, PROMPTS, [0], [scorer], tmp_path)
    page = write_report(tmp_path, runs=[run, models / "lora"]).read_text()
    assert page.count("<script") == 1 and "<img src=x" not in page and "CLIP score" in page
    blind = (tmp_path / "blind.html").read_text()
    assert blind.count("<script") == 2 and "<script>alert" not in blind


def test_shown_bounds_the_images(compared):
    folder, _, _ = compared
    assert write_report(folder, shown=3).read_text().count('"picture"') == 3 * 4
    assert write_report(folder, shown=24).read_text().count('"picture"') == 6 * 4


def test_a_run_without_metrics_is_named(compared, tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        write_report(compared[0], runs=[tmp_path])


def contrast(mean, low, high, groups_for_power=63, better=1):
    gap = {"mean": mean, "low": low, "high": high, "level": 0.95}
    return {
        "mean": 0.41 + mean,
        "mean_against": 0.41,
        "difference": gap,
        "groups_for_power": groups_for_power,
        "better": better,
    }


def test_figures_are_said_in_words():
    entry = contrast(0.165, 0.09, 0.241)
    sentence = words.difference_sentence("oracle accuracy", "proportion", entry)
    assert sentence.replace(words.PERCENT, " %").replace(words.ARROW, "->") == (
        "oracle accuracy 41.0 % -> 57.5 %, +16.5 points, 95 % interval 9.0 to 24.1."
    )
    assert words.verdict(entry, 100).startswith("A gain")
    assert words.verdict(contrast(-0.1, -0.2, -0.01), 100).startswith("A loss")
    assert words.verdict(contrast(-0.1, -0.2, -0.01, better=-1), 100).startswith("A gain")
    assert "About 2,140 prompts" in words.verdict(contrast(0.01, -0.1, 0.1, 2140), 100)
    assert words.verdict(contrast(0.0, 0.0, 0.0, None), 100) == "No difference."
    assert words.change(-0.0001, "score") == "0.00" and words.change(0.0001, "proportion") == "0.0 points"
    assert words.change(-1.5, "score") == "\N{MINUS SIGN}1.50"


TITLES = {"clip": "CLIP score", "oracle/all": "oracle accuracy"}


def test_the_best_are_told_in_a_sentence_and_a_row_each():
    best = {"chosen_by": "score", "chosen": dict.fromkeys(("base", "sft", "dpo", "cpo"))}
    pairs = [("sft", 2.0, 1.0, 3.0), ("dpo", 4.0, 1.0, 7.0), ("cpo", 9.0, -1.0, 19.0)]
    best["contrasts"] = [
        {"system": name, "against": "base", "metrics": {"score": contrast(mean, low, high)}}
        for name, mean, low, high in pairs
    ]
    best["contrasts"].append(
        {"system": "dpo", "against": "sft", "metrics": {"score": contrast(2.0, 1.0, 3.0)}}
    )
    rows = words.at_their_best(best, "score")
    assert list(rows) == ["base", "sft", "dpo", "cpo"] and rows["base"].keys() == {"mean"}
    assert rows["dpo"]["difference"]["mean"] == 4.0
    assert words.at_their_best(best, "other") == dict.fromkeys(rows)
    titles, told = {"score": "the score"}, {"score": {"kind": "score"}}
    sentence = words.best_sentence(best, titles, told)
    assert sentence.startswith("dpo gains most over base: the score ") and "+4.00" in sentence
    assert sentence.endswith("So do, by less: sft."), "cpo's interval holds 0"
    best["contrasts"] = best["contrasts"][2:3]
    said = words.best_sentence(best, titles, told)
    assert said == "By the score, none of sft, dpo, cpo is surely better than base."


def test_a_judge_that_is_pleased_while_the_truth_falls_is_pointed_out():
    entry = {"metrics": {"clip": contrast(0.1, 0.05, 0.2), "oracle/all": contrast(-0.1, -0.2, -0.05)}}
    warning = words.disagreement(entry, TITLES)
    assert warning is not None and "CLIP score improved, oracle accuracy got worse" in warning
    entry["metrics"]["oracle/all"] = contrast(0.1, -0.2, 0.3)
    assert words.disagreement(entry, TITLES) is None


def recipe(monkeypatch, *arguments):
    """Run the recipe in this process, as `python recipes/compare_text_to_image.py` would."""
    monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
    runpy.run_path(str(ROOT / RECIPE), run_name="__main__")


def tiny_comparison(models):
    return {
        "model_name_or_path": models / "sd",
        "systems": ["base", f"dpo={models / 'lora'}"],
        "clip_model_name_or_path": models / "clip",
        "prompts": "pocket",
        "num_inference_steps": 2,
        "num_prompts": 4,
    }


def test_the_recipe_by_path_in_two_processes_gives_what_one_gives(models, tmp_path, monkeypatch, capsys):
    options = tiny_comparison(models) | {"lora_scales": [0, 1], "runs": models / "lora"}
    one, two = tmp_path / "one", tmp_path / "two"
    recipe(monkeypatch, *arguments(options | {"output_dir": one}))
    assert "dpo at 1" in capsys.readouterr().out and (one / "report.html").stat().st_size < 1_000_000
    summary = json.loads((one / "summary.json").read_text())
    assert summary["metrics"].keys() >= {"clip", "oracle/all", "oracle/animal", "oracle/count"}

    torchrun(RECIPE, options | {"output_dir": two})
    # Each process leaves the scores of its share: both took part.
    shares = [len(values(two / f"scores-0000{rank}.sqlite")) for rank in (0, 1)]
    assert shares[0] == shares[1] > 0
    tables = [
        [json.loads(line) for line in (d / "results.jsonl").read_text().splitlines()] for d in (one, two)
    ]
    assert [row["image"] for row in tables[0]] == [row["image"] for row in tables[1]]
    clips = [[row["scores"]["clip"] for row in table] for table in tables]
    np.testing.assert_allclose(*clips, atol=0.2)  # pixels may differ by the kernels' rounding


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems", "base", "dpo=no/such/run"], "no/such/run"),
        (["--prompts", "no-prompts.txt"], "no-prompts.txt"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--systems", "base", "base"], "'base' is named twice among the systems"),
        (["--critic", "./no-critic"], "no-critic"),
        (["--critic_typed"], "name the --critic, too"),
        (["--discriminator_name_or_path", "./none"], "there is no ./none"),
        (["--judge_model_name_or_path", "pocket", "--rubric", "mine"], "there is no rubric 'mine'"),
        (["--judge_model_name_or_path", "pocket", "--rubric", "class_conditional"], "it asks about {class}"),
        (["--rubric", "reward"], "name the --judge_model_name_or_path, too"),
        (["--votes", "no-votes.json"], "--votes: there is no file no-votes.json"),
        (["--runs", "no-run"], "no-run is no training run: it holds no metrics.jsonl"),
    ],
)
def test_bad_input_ends_with_a_message_and_exit_code_2(models, tmp_path, flags, message, monkeypatch, capsys):
    given = ["--model_name_or_path", str(models / "sd"), "--clip_model_name_or_path", str(models / "clip")]
    given += ["--prompts", "pocket"]
    adapter = ["--systems", "base", f"dpo={models / 'lora'}", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        recipe(monkeypatch, *given, *adapter, *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# A critic


def said_of(body):
    """What a scripted critic says: nothing that can be read of prompts whose length 3 divides."""
    text = body["messages"][0]["content"][-1]["text"]
    assert "Does the picture show what was asked for?" in text
    length = len(text.split("Description:")[1].split("\n\n")[0].strip())
    return chat("I cannot tell." if length % 3 == 0 else f"It is fine.\nScore: {length}")


def test_a_critic_grades_images_and_what_it_cannot_is_counted(models, tmp_path, monkeypatch, capsys):
    """By the recipe, with a critic behind a server that sees each image once."""
    with Scripted({"/v1/chat/completions": lambda body, _: said_of(body)}) as server:
        options = tiny_comparison(models) | {"output_dir": tmp_path, "num_seeds": 1, "num_prompts": 8}
        options |= {"critic": "my-critic", "critic_url": server.url, "seed": 5}
        recipe(monkeypatch, *arguments(options))
        asked = len(server.calls)
        recipe(monkeypatch, *arguments(options | {"lora_scales": [1]}))
        assert asked == len(server.calls) == 16 and len(server.bodies("/v1/chat/completions")) == 16
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row in rows:
        length = len(row["prompt"])
        assert row["scores"]["critic"] == (None if length % 3 == 0 else length)
    summary = json.loads((tmp_path / "summary.json").read_text())
    read = [row["scores"]["critic"] for row in rows if row["system"] == "dpo" and row["scores"]["critic"]]
    assert 0 < len(read) < 8
    assert summary["systems"]["dpo"]["means"]["critic"] == pytest.approx(np.mean(read))
    assert summary["systems"]["dpo"]["unread"] == {"critic": 8 - len(read)}
    assert summary["contrasts"][0]["metrics"]["critic"]["difference"]["groups"] == len(read)
    page = (tmp_path / "report.html").read_text()
    assert f"could not be read: critic score (base {8 - len(read)}, dpo {8 - len(read)})" in page
    assert "</span> unread" in page and "could not be read" in capsys.readouterr().out


def test_a_typed_critic_of_images_has_words_for_them():
    words = Templates.load(CRITICS / "image_typed").words(ScoreCase([], "Shown?", "a <lion>"))
    assert "Question: Shown?" in words and words.endswith("is to answer: a <lion>")


# A judge and a discriminator


def test_a_judge_and_a_discriminator_score_beside_clip(models, tmp_path, monkeypatch, capsys):
    """The pocket's VLM answers whether an image shows its prompt; the discriminator reads its own latents."""
    options = tiny_comparison(models) | {"output_dir": tmp_path, "num_seeds": 1}
    recipe(monkeypatch, *arguments(options | {"judge_model_name_or_path": "pocket"}))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    judged = [row["scores"]["judge"] for row in rows]
    assert len(set(judged)) > 1 and all(-1 <= score <= 1 for score in judged)
    assert "Does the picture show everything" in (tmp_path / "report.html").read_text()
    options |= {"discriminator_name_or_path": "pocket", "output_dir": tmp_path}
    recipe(monkeypatch, *arguments(options))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    images = [Image.open(tmp_path / row["image"]).convert("RGB") for row in rows]
    expected = DiscriminatorScorer("pocket").rewards(images, [row["prompt"] for row in rows])
    np.testing.assert_allclose([row["scores"]["discriminator"] for row in rows], expected, atol=1e-3)


def test_a_judge_s_score_is_the_rubric_s_soft_score():
    class Sure:
        identity = "sure"

        def answer(self, cases):
            return [[Answer({"yes": 0.9, "no": 0.1}) for _ in case.questions] for case in cases]

    scorer = judge_scorer(Lazy("sure", Sure), Rubric.load("whole_prompt"), "Sure")
    assert scorer.score(["image"] * 2, ["a", "b"]) == pytest.approx([0.8, 0.8])
    assert (
        "from -1 to 1" in scorer.about and "Sure answers to 'Does the picture show everything" in scorer.about
    )
    assert scorer.identity != judge_scorer(Lazy("other", Sure), Rubric.load("whole_prompt"), "Sure").identity


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(Answer({"yes": 0.05, "no": 0.05}, other_mass=0.9), None), (Answer({"yes": np.nan, "no": 0.1}), "nan")],
)
def test_a_judge_that_does_not_answer_has_no_score_and_one_that_fails_is_named(tmp_path, answer, expected):
    class Odd:
        def answer(self, cases):
            return [[answer for _ in case.questions] for case in cases]

    scorer = judge_scorer(Lazy("odd", Odd), Rubric.load("whole_prompt"), "Odd")
    ledger = Ledger(tmp_path, "scores", 0)
    if expected is None:
        assert kept_scores(scorer, ["a"], lambda keys: (["image"], ["prompt"]), ledger) == {"a": {"": None}}
    else:
        with pytest.raises(InputError, match="the scorer judge gave nan"):
            kept_scores(scorer, ["a"], lambda keys: (["image"], ["prompt"]), ledger)


# Sweeps


def test_systems_have_variants_and_samplers_of_their_own(models, tmp_path):
    config = runpy.run_path(str(ROOT / RECIPE))["CompareConfig"]
    spaced = tmp_path / "a folder"
    spaced.symlink_to(models / "lora")
    given = {"prompts": "pocket", "clip_model_name_or_path": str(models / "clip")}
    given |= {
        "model_name_or_path": str(models / "sd"),
        "guidance_scales": [1.0, 4.5],
        "lora_scales": [0.5, 1],
    }
    systems = ["base", f"dpo={spaced}", f"slow={models / 'lora'} steps=50 guidance=2"]
    families = config(systems=systems, **given).families
    assert list(families["base"]) == ["base, guidance 1", "base, guidance 4.5"]
    assert list(families["dpo"])[:3] == [
        "dpo at 0.5, guidance 1",
        "dpo at 1, guidance 1",
        "dpo at 0.5, guidance 4.5",
    ]
    assert families["dpo"]["dpo at 1, guidance 4.5"].sampler.guidance_scale == 4.5
    assert families["dpo"]["dpo at 1, guidance 4.5"].adapter == str(spaced)
    assert list(families["slow"]) == ["slow at 0.5", "slow at 1"], "its own guidance is not swept"
    assert families["slow"]["slow at 1"].sampler == Sampler(50, 2.0)
    with pytest.raises(InputError, match="guidance is 'much', not a number"):
        config(systems=["base", "more guidance=much"], **given)
    for systems, changes, twice in (
        (["base"], {"guidance_scales": [2, 2.0]}, "base, guidance 2"),
        (["dpo at 0.5", f"dpo={models / 'lora'}"], {"guidance_scales": []}, "dpo at 0.5"),
    ):
        with pytest.raises(InputError, match=f"'{twice}' is named twice"):
            config(systems=systems, **given | changes)


def test_a_sweep_has_a_report_that_opens_with_each_ones_best(models, tmp_path, monkeypatch, capsys):
    options = tiny_comparison(models) | {"guidance_scales": [1, 3], "output_dir": tmp_path}
    loads, load = [], text_to_image.load_generator
    monkeypatch.setattr(text_to_image, "load_generator", lambda *a: loads.append(a) or load(*a))
    recipe(monkeypatch, *arguments(options))
    assert len(loads) == 2, "another guidance loads no model"
    page, summary = (
        (tmp_path / "report.html").read_text(),
        json.loads((tmp_path / "summary.json").read_text()),
    )
    assert summary["best"]["chosen_by"] == "oracle/all"
    places = [page.index(title) for title in ("Each at its best", "Every two systems", "At equal settings")]
    assert places == sorted(places) and "none of dpo is surely better than base" in page
    assert "Too few to claim: 4 prompts" in page and "By part: animal" in page
    assert page.count("<svg") == 2 + 2  # win bars, curves over guidance
    assert page.count('"picture"') == 2 * 8, "the best variant of each"
    assert "each at its best" in capsys.readouterr().out


def test_the_end_names_both_pages_and_fewer_prompts_only_if_more_were_asked_for(
    models, tmp_path, monkeypatch, capsys
):
    (tmp_path / "three.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)  # so that paths are short, and stay on a line
    options = tiny_comparison(models) | {"prompts": "three.txt", "num_seeds": 1, "output_dir": "out"}
    del options["num_prompts"]
    recipe(monkeypatch, *arguments(options))
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == ["out/report.html", "out/blind.html"] and "fewer than" not in err
    assert "Too few to claim: 3 prompts" in " ".join(out.split("base against")[0].split())
    recipe(monkeypatch, *arguments(options | {"num_prompts": 4}))
    assert "3 prompts, fewer than the 4 asked for" in capsys.readouterr().err


# Votes


def test_the_recipe_reads_votes_before_it_generates(models, tmp_path, monkeypatch, capsys):
    options = tiny_comparison(models) | {"output_dir": tmp_path / "out", "num_seeds": 1, "num_prompts": 2}
    recipe(monkeypatch, *arguments(options))
    blind = (tmp_path / "out" / "blind.html").read_text()
    shown = json.loads(re.search(r'id="comparison">(.*?)</script>', blind)[1])  # type: ignore[index]
    identities = {system["name"]: system["identity"] for system in shown["systems"]}
    votes = [
        {"systems": ["base", "dpo"], "prompt": row["prompt"], "seed": row["seed"], "winner": winner}
        for row, winner in zip(shown["rows"], ("dpo", None), strict=True)
    ]
    file = tmp_path / "votes.json"
    file.write_text(json.dumps({"comparison": identities, "votes": votes}))
    capsys.readouterr()
    recipe(monkeypatch, *arguments(options | {"votes": file}))
    out = " ".join(capsys.readouterr().out.split())
    assert "People: Of 2 votes dpo against base wins 1, ties 1, loses 0: 75.0" in out
    assert "People&#39;s votes" in (tmp_path / "out" / "report.html").read_text().replace("'", "&#39;")

    # The same files at another number of steps are another comparison, of which nothing is generated.
    monkeypatch.setattr(text_to_image, "load_generator", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(SystemExit):
        recipe(monkeypatch, *arguments(options | {"votes": file, "num_inference_steps": 3}))
    assert "votes.json: vote 1 is of another comparison" in capsys.readouterr().err
