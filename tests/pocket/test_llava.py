"""The pocket's LLaVA as a judge, at describing, at writing; and the flawed pictures it is asked about."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pretraining import llava_quality
from pretraining.flaws import FLAWS, PARTS, answers, possible, render_flawed, render_parts

from data_builders.prompts.generate import Templates
from data_builders.prompts.list_parsing import parse_list
from data_builders.prompts.llm import LocalLLM
from prefopt import pocket
from prefopt.judges.loading import load_judge
from prefopt.judges.questions import NO, YES, Answer, Case, Question
from prefopt.judges.rubric import Rubric
from prefopt.judges.shared_prefix import SharedPrefixJudge
from prefopt.pocket import world
from prefopt.pocket.drawing import COLOURS
from prefopt.pocket.world import Scene

FOLDER = pocket.folder("llava")
PROVENANCE = json.loads((FOLDER.parent.parent / "PROVENANCE.json").read_text(encoding="utf-8"))
RUBRIC = Rubric.load("class_conditional")
LION = Scene("lion", "green", 1, "lake")


@pytest.fixture(scope="module")
def judge() -> SharedPrefixJudge:
    return load_judge("pocket", batch_size=16)


class AlwaysYes:
    """A judge that says yes to everything."""

    identity = "yes"

    def answer(self, cases):
        """Yes."""
        return [[Answer({YES: 1.0, NO: 0.0}) for _ in case.questions] for case in cases]


def hard_score(judge: SharedPrefixJudge, image, asked: Scene) -> float:
    prompt = world.caption(asked, 0)
    questions = RUBRIC.questions(asked.animal, prompt)
    (found,) = judge.answer([Case(image, prompt, questions)])
    return sum(RUBRIC.points({q.name: a.verdict for q, a in zip(questions, found, strict=True)}).values())


# Flawed pictures


def test_a_flawed_picture_is_a_function_of_scene_flaw_and_seed():
    for flaw in FLAWS:
        first, again, other = (render_flawed(LION, flaw, seed) for seed in (1, 1, 2))
        assert first.tobytes() == again.tobytes() != other.tobytes()
        assert first.size == (64, 64) and first.mode == "RGB"
    assert render_flawed(LION, "none", 1).tobytes() != render_flawed(LION, "blur", 1).tobytes()


@pytest.mark.parametrize("animal", world.ANIMALS)
def test_parts_tell_the_flaws_apart(animal):
    scene = Scene(animal, "blue", 2, "desert")

    def pixels(flaw: str) -> Counter[str]:
        found = np.concatenate([render_parts(scene, flaw, seed).ravel() for seed in range(8)])
        return Counter(PARTS[i] for i in found if i >= 0)

    sound = pixels("none")
    assert set(sound) == {f"{animal} {part}" for part in ("body", "head", "leg")}
    assert pixels("head_missing")[f"{animal} head"] == 0
    assert 0 < pixels("legs_missing")[f"{animal} leg"] < 0.5 * sound[f"{animal} leg"]
    assert set(pixels("leg_too_many")) - set(sound) == {"fifth leg"}
    assert set(pixels("odd_patch")) - set(sound) == {"patch"}
    assert not pixels("no_animal")
    others = {part.split()[0] for part in pixels("neighbour")} - {animal}
    assert others and others <= set(world.ANIMALS)


def test_parts_lie_where_the_animals_are():
    for seed in range(5):
        drawn = render_parts(LION, "none", seed) >= 0
        # The pen of flaws draws the animal that the world draws, whatever else it draws from its seed.
        assert 0.03 < drawn.mean() < 0.5
        red, green, blue = np.asarray(render_flawed(LION, "none", seed))[drawn].astype(int).T
        assert np.median(green - (red + blue) // 2) > 30


def test_what_is_right_follows_from_flaw_and_description():
    sound = answers(LION, "none", LION)
    assert all(sound[item.name] == (item.polarity == "positive") for item in RUBRIC.items)
    zebra = Scene("zebra", "green", 1, "lake")
    wrong = answers(LION, "none", zebra)
    assert not wrong["class_visible"] and not wrong["whole_prompt"] and wrong["colours"]
    assert "anatomy" not in wrong, "nobody is asked about the legs of what is not there"
    assert not answers(LION, "legs_missing", LION)["anatomy"]
    assert not possible(Scene("lion", "green", 3, "lake"), "neighbour")


# The model


def test_it_is_asked_as_any_llava_is(judge):
    assert isinstance(judge, SharedPrefixJudge)
    assert judge.answerer.model.config.model_type == "llava"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000


def test_it_answers_the_rubric_better_than_yes_to_everything(judge):
    """Held-out scenes, sound and flawed, half of the descriptions off in one word."""
    rng = np.random.default_rng(5)
    scenes, held_out = [], world.held_out_scenes()
    while len(scenes) < 240:
        scene = held_out[rng.integers(len(held_out))]
        flaws = [flaw for flaw in FLAWS if possible(scene, flaw)]
        scenes.append((scene, flaws[rng.integers(len(flaws))], 50_000 + len(scenes)))
    images = [render_flawed(*item) for item in scenes]
    drawn = SimpleNamespace(scenes=[item[0] for item in scenes], flaws=[item[1] for item in scenes])
    exams = llava_quality.make_exams(drawn, images, seed=6)
    marks = llava_quality.judged(judge, exams)
    assert marks["all"]["right"] >= 0.9 > marks["all"]["always_yes"] + 0.2
    for name, figures in marks.items():
        assert (figures["right_of_yes"] + figures["right_of_no"]) / 2 >= 0.75, name
    assert llava_quality.judged(AlwaysYes(), exams)["all"]["right"] == marks["all"]["always_yes"]


def test_the_better_picture_has_the_higher_hard_score(judge):
    sound, flawed, absent = [], [], []
    for number, asked in enumerate(world.held_out_scenes()[::6]):
        sound.append(hard_score(judge, world.render(asked, number), asked))
        flawed.append(hard_score(judge, render_flawed(asked, "legs_missing", number), asked))
        absent.append(hard_score(judge, render_flawed(asked, "no_animal", number), asked))
    assert np.mean(np.greater(sound, absent)) >= 0.95
    assert np.mean(np.greater(sound, flawed)) >= 0.7, "legs of three small animals are few pixels"


def test_an_empty_picture_is_no_yes(judge):
    """A judge that sees an elephant in plain grey has learned the question, not the picture."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    prompt = "one blue elephant in the snow"
    names = ("class_visible", "whole_prompt")
    questions = tuple(q for q in RUBRIC.questions("elephant", prompt) if q.name in names)
    (found,) = judge.answer([Case(grey, prompt, questions)])
    assert all(answer.log_odds < 2 for answer in found)


def test_choices_and_scores_are_answered_too(judge):
    colour = Question("colour", "Which colour are the animals?", "choice", tuple(COLOURS))
    scenes = [Scene(animal, c, 1, "snow") for animal in ("lion", "zebra") for c in COLOURS]
    cases = [Case(world.render(s, 9), world.caption(s, 0), (colour,)) for s in scenes]
    right = [a.verdict == s.colour for (a,), s in zip(judge.answer(cases), scenes, strict=True)]
    assert np.mean(right) >= 0.75


def test_it_writes_lists_of_prompts():
    templates = Templates.load()
    request = templates.request(0, "giraffe", 10)
    prompts = parse_list(LocalLLM("pocket").generate(templates.system, request, seed=3), 10)
    scenes = [world.parse(prompt) for prompt in prompts]
    assert len(set(scenes)) >= 9 and {scene.animal for scene in scenes} == {"giraffe"}
    assert not any(world.is_held_out(scene) for scene in scenes)


def test_provenance_says_how_often_it_is_right():
    quality = PROVENANCE["llava"]["quality"]
    over_all = quality["held_out_answers"]["all"]
    assert over_all["right"] >= 0.9 > over_all["always_yes"]
    assert min(of["right"] for of in quality["of_which"].values()) >= 0.85
    assert quality["lists"]["lists_complete"] >= 0.9 and quality["lists"]["lines_good"] >= 0.9
