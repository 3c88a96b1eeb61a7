"""Critics: scores and preferences of a local model, of a server, and of a judge's probabilities."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from servers import Scripted, chat
from tiny_vlm import picture, tiny_judge

from prefopt import endpoint, pocket
from prefopt.errors import InputError
from prefopt.judges.critic import BETTER, QUALITY, TEXT, TYPED, TextCritic, TypedCritic
from prefopt.judges.critic_cases import PairCase, Preference, ScoreCase, Templates
from prefopt.judges.loading import lazy_critic, load_critic
from prefopt.judges.questions import Answer
from prefopt.judges.writers import LocalWriter, Message, Reply
from prefopt.vlm.generate import Request, generate

CHAT = "/v1/chat/completions"
QUESTION = "What animal is it?"
SCORED = [ScoreCase([picture(i)], QUESTION, f"answer {i}") for i in range(4)]
PAIR = PairCase([picture(0)], QUESTION, "a zebra", "a red elephant")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


class Scripts:
    """A writer whose reply is a function of the message's text."""

    identity, name, max_new_tokens = "scripts", "scripts", 512

    def __init__(self, reply):
        self.reply, self.asked = reply, list[Message]()

    def write(self, messages):
        self.asked += messages
        replies = [self.reply(message.text) for message in messages]
        return [reply if isinstance(reply, Reply) else Reply(reply, True) for reply in replies]


def by_answer(**replies: str):
    """A reply by which answer a message holds."""
    return lambda text: next(reply for answer, reply in replies.items() if answer.replace("_", " ") in text)


def by_first(zebra_first, elephant_first):
    """A reply by which answer stands first."""
    return lambda text: (
        zebra_first if text.index("a zebra") < text.index("a red elephant") else elephant_first
    )


# What is written


def test_scores_are_read_and_what_cannot_be_is_counted(caplog):
    replies = by_answer(
        answer_0="Right. Score: 85", answer_1="Score: 120", answer_2="Well said!", answer_3="0"
    )
    critic = TextCritic(Scripts(replies))
    assert critic.score(SCORED) == [85, None, None, 0]
    assert (critic.readings.asked, critic.readings.unreadable) == (4, 2)
    assert critic.readings.examples == ["Score: 120", "Well said!"]
    assert "2 of 4 replies so far could not be read" in caplog.text
    assert critic.score(SCORED[:1]) == [85] and critic.readings.asked == 5
    assert critic.score([]) == []


@pytest.mark.parametrize(
    ("zebra_first", "elephant_first", "expected"),
    [
        ("Verdict: first", "Verdict: second", Preference(1.0, True)),
        ("Verdict: second", "Verdict: first", Preference(0.0, True)),
        ("Verdict: tie", "Verdict: tie", Preference(0.5, True)),
        ("Verdict: first", "Verdict: first", Preference(0.5, False)),
        ("Verdict: second", "Verdict: second", Preference(0.5, False)),
        ("Verdict: first", "Verdict: tie", Preference(0.75, False)),
    ],
)
def test_both_orders_are_asked_and_averaged(zebra_first, elephant_first, expected):
    """Guards: the order is never swapped (UnifiedReward), so that a bias for the first answer counts."""
    critic = TextCritic(Scripts(by_first(zebra_first, elephant_first)))
    assert critic.compare([PAIR]) == [expected]
    mirrored = Preference(1 - expected.p_first, expected.consistent)
    assert critic.compare([PAIR.swapped]) == [mirrored]
    assert critic.readings.asked == 4


@pytest.mark.parametrize("unread", ["", "Answer 1 has colours, answer 2 has none.", "I cannot tell."])
@pytest.mark.parametrize("order", ["straight", "swapped"])
def test_a_parse_failure_is_no_win(unread, order):
    """Guards: a parse failure means 'answer 1 wins' (UnifiedReward)."""
    read = {"straight": "Verdict: first", "swapped": "Verdict: second"}
    read[order] = unread
    critic = TextCritic(Scripts(by_first(read["straight"], read["swapped"])))
    assert critic.compare([PAIR]) == [None]
    assert (critic.readings.asked, critic.readings.unreadable) == (2, 1)


def test_a_reply_that_was_cut_off_is_not_read():
    """Guards: 'Score: 8', cut from 'Score: 85'."""
    critic = TextCritic(Scripts(by_answer(answer_0=Reply("Score: 8", False), answer_1="Score: 85")))
    assert critic.score(SCORED[:2]) == [None, 85]
    assert critic.readings.examples == ["Score: 8 [cut off after 512 tokens]"]


def test_a_critic_of_which_nothing_can_be_read_is_an_error_with_an_example():
    critic = TextCritic(Scripts(lambda _: "A fine day."))
    with pytest.raises(InputError, match=r"none of the 4 replies of scripts .* such as 'A fine day\.'"):
        critic.score(SCORED)


def test_what_is_shown_holds_the_case_and_nothing_else():
    writer = Scripts(lambda text: "Score: 1" if "Score: N" in text else "Verdict: tie")
    critic = TextCritic(writer)
    question, answer = "Is {answer} \\1 a {place}?", "{question} {{x}} %s <b>"
    critic.score(
        [ScoreCase([picture(0), picture(1)], question, answer), ScoreCase([], "Q?", "A.", "the right one")]
    )
    critic.compare([PairCase([], "Q?", "one thing", "another", "the right one")])
    two, none, straight, swapped = writer.asked
    assert f"\n{question}\n" in two.text and f"\n{answer}\n" in two.text and len(two.images) == 2
    assert "the right one" in none.text and "comparison" not in two.text and not none.images
    assert straight.text.index("one thing") < straight.text.index("another") < straight.text.index("Verdict")
    assert swapped.text.index("another") < swapped.text.index("one thing")
    assert "the right one" in straight.text and "{" not in straight.text


# Templates


@pytest.mark.parametrize("folder", [TEXT, TYPED], ids=["text", "typed"])
def test_ours_have_all_four(folder):
    assert set(Templates.load(folder).texts) == {
        "score",
        "score_with_reference",
        "compare",
        "compare_with_reference",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"is no folder of templates; those are compare\.txt"),
        ({"grade.txt": "{question}"}, r"grade\.txt is no template of a critic; those are compare\.txt"),
        (
            {"score.txt": "{question} {answer} {respones}"},
            r"score\.txt has the place \{respones\}; its places",
        ),
        ({"score.txt": "{question} {answer} {reference}"}, r"score\.txt has the place \{reference\}"),
        ({"score.txt": "{question}"}, r"score\.txt has no place \{answer\}"),
        ({"compare.txt": "{question} {first}"}, r"compare\.txt has no place \{second\}"),
    ],
)
def test_a_template_that_cannot_be_right_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        Templates.load(tmp_path)


def test_a_users_own_words_are_taken_as_they_are(tmp_path):
    """As a model card has them, with JSON in them and code in the places of others."""
    (tmp_path / "score.txt").write_text('{question}|{answer}|{"score": N}|{{ 7 * 7 }}|{% raw %}|{answer.x}')
    templates = Templates.load(tmp_path)
    assert templates.words(ScoreCase([], "Q", "A")) == 'Q|A|{"score": N}|{{ 7 * 7 }}|{% raw %}|{answer.x}'
    with pytest.raises(InputError, match=r"no compare\.txt, which this case needs: 'What animal"):
        templates.words(PAIR)
    with pytest.raises(InputError, match=r"no score_with_reference\.txt.* or leave the reference answer out"):
        templates.words(ScoreCase([], "Q", "A", "R"))


# A server


def test_a_server_is_shown_images_and_text(tmp_path):
    def route(body, _):
        content = body["messages"][0]["content"]
        return chat({"answer 0": "Score: 90", "answer 1": "Hm."}[content[-1]["text"]])

    (tmp_path / "score.txt").write_text("{answer}{question}")
    cases = [ScoreCase([picture(0), picture(1)], "", "answer 0"), ScoreCase([], "", "answer 1")]
    with Scripted({CHAT: route}) as server:
        critic = load_critic("a-critic", url=server.url, templates=tmp_path, max_new_tokens=99)
        assert critic.score(cases) == [90, None]
    [body] = [body for body in server.bodies(CHAT) if len(body["messages"][0]["content"]) == 3]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-critic", 0.0, 99)
    *images, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "answer 0"}
    for place, block in enumerate(images):
        png = block["image_url"]["url"].removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(png))) as seen:
            assert seen.tobytes() == picture(place).tobytes()


def test_a_servers_reply_that_was_cut_off_is_not_read():
    with Scripted({CHAT: lambda _, n: chat("Score: 8", "length" if n else "stop")}) as server:
        critic = load_critic("c", url=server.url)
        assert critic.score(SCORED[:1]) == [8] and critic.score(SCORED[:1]) == [None]


def test_a_server_out_of_reach_is_an_error():
    with Scripted({CHAT: lambda *_: (401, {}, "who are you")}) as server:
        critic = load_critic("c", url=server.url)
        with pytest.raises(InputError, match="PREFOPT_API_KEY"):
            critic.compare([PAIR])


# A local model


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return tiny_judge(tmp_path_factory.mktemp("llava"))


def test_a_local_writer_replies_greedily(llava):
    writer = LocalWriter(llava, max_new_tokens=8, batch_size=2)
    transparent = picture(2).convert("RGBA")
    messages = [
        Message([picture(0)], "What is it?"),
        Message([], "Hello"),
        Message([picture(1), transparent], "And?"),
    ]
    blocks = [[*({"type": "image"} for _ in m.images), {"type": "text", "text": m.text}] for m in messages]
    requests = [
        Request([image.convert("RGB") for image in message.images], [{"role": "user", "content": content}])
        for message, content in zip(messages, blocks, strict=True)
    ]
    expected = generate(writer.model, writer.processor, requests, max_new_tokens=8, temperature=0.0)
    assert writer.write(messages) == [Reply(reply.text, reply.finished) for (reply,) in expected]
    assert len({reply.text for (reply,) in expected}) == 3


def test_a_local_critic_that_says_nothing_readable_is_an_error(llava):
    critic = load_critic(llava, max_new_tokens=4)
    with pytest.raises(InputError, match=r"none of the 2 replies .*cut off after 4 tokens.*another critic"):
        critic.score(SCORED[:2])


def test_the_pocket_is_a_critic_whose_places_suffice():
    """Its LLaVA was never taught to grade; what counts is that our longest words fit its positions."""
    critic = load_critic(str(pocket.folder("llava")), max_new_tokens=2)
    longest = PairCase([picture(0)], QUESTION, "a zebra " * 20, "a lion " * 20, "a red zebra " * 20)
    with pytest.raises(InputError, match="none of the 2 replies"):
        critic.compare([longest])
    assert isinstance(critic, TextCritic)


# A judge's probabilities


class Judged:
    """A judge whose probabilities are a function of the evidence."""

    identity = "judged"

    def __init__(self, answer):
        self.give, self.asked = answer, []

    def answer(self, cases):
        self.asked += cases
        return [[self.give(case.prompt)] for case in cases]


def levels(*shares: float, other_mass: float = 0.0) -> Answer:
    return Answer(dict(zip(QUALITY.options, shares, strict=True)), other_mass)


def test_a_typed_score_is_the_expected_level():
    given = {
        "answer 0": levels(0, 0, 0, 0, 1),
        "answer 1": levels(1, 0, 0, 0, 0),
        "answer 2": levels(0.1, 0.2, 0.3, 0.4, 0),
        "answer 3": levels(0, 0, 0, 0, 1, other_mass=0.9),
    }
    judge = Judged(lambda prompt: next(answer for name, answer in given.items() if name in prompt))
    critic = TypedCritic(judge)
    assert critic.score(SCORED) == [100, 0, pytest.approx(0.2 * 25 + 0.3 * 50 + 0.4 * 75), None]
    assert (critic.readings.asked, critic.readings.unreadable) == (4, 1)
    assert judge.asked[0].questions == (QUALITY,) and judge.asked[0].image is SCORED[0].images[0]
    assert QUESTION in judge.asked[0].prompt


@pytest.mark.parametrize(
    ("straight", "swapped", "expected"),
    [
        (0.9, 0.3, Preference(21**0.5 / (1 + 21**0.5), True)),  # odds of 9 and 7 / 3
        (0.9, 0.75, Preference(3**0.5 / (1 + 3**0.5), False)),  # of 9 and 1 / 3
        (0.2, 0.8, Preference(0.2, True)),
        (0.9, 0.9, Preference(0.5, False)),  # it likes the first place, whatever stands there
        (0.5, 0.5, Preference(0.5, True)),
        (1.0, 0.5, Preference(0.75, False)),  # no odds: the mean of p
    ],
)
def test_a_typed_preference_is_a_probability_over_both_orders(straight, swapped, expected):
    def answer(prompt):
        first = by_first(straight, swapped)(prompt)
        return Answer(dict(zip(BETTER.options, (first, 1 - first), strict=True)))

    [found] = TypedCritic(Judged(answer)).compare([PAIR])
    assert found.p_first == pytest.approx(expected.p_first) and found.consistent == expected.consistent


def test_a_typed_answer_off_the_options_is_no_win():
    def answer(prompt):
        return Answer(dict(zip(BETTER.options, (0.9, 0.1), strict=True)), by_first(0.0, 0.8)(prompt))

    critic = TypedCritic(Judged(answer))
    assert critic.compare([PAIR]) == [None] and critic.readings.unreadable == 1


def test_a_typed_critic_says_that_it_shows_one_image():
    critic = TypedCritic(Judged(lambda _: levels(0, 0, 0, 0, 1)))
    for images in ([], [picture(0), picture(1)]):
        with pytest.raises(
            InputError, match=rf"shows its judge one image, and 'What animal.* has {len(images)}"
        ):
            critic.score([ScoreCase(images, QUESTION, "A")])


def test_a_local_model_answers_typed_questions(llava):
    critic = load_critic(llava, typed=True)
    read = critic.judge.answerer.read
    # Most of a random model's mass is on other tokens, and that is not looked at here.
    critic.judge.answerer.read = lambda *asked: [Answer(answer.probabilities) for answer in read(*asked)]
    scores = critic.score(SCORED)
    assert all(0 < score < 100 for score in scores) and np.ptp(scores) > 0.01
    [one], [other] = critic.compare([PAIR]), critic.compare([PAIR.swapped])
    assert one.p_first == pytest.approx(1 - other.p_first, abs=1e-6) and one.p_first != 0.5
    assert one.consistent == other.consistent


def test_a_server_answers_typed_questions():
    """By the text route; 'A' is the first option's letter."""

    def route(body, _):
        if "logprobs" in body:
            return 400, {}, "logprobs are not supported"
        text = body["messages"][0]["content"][-1]["text"]
        return chat(by_first("A", "B")(text) if "a zebra" in text else "Yes")

    with Scripted({CHAT: route}) as server:
        [preference] = load_critic("m", url=server.url, typed=True).compare([PAIR])
    assert preference.consistent and preference.p_first == pytest.approx(1, abs=1e-6)


# Identities


def test_an_identity_is_known_before_loading_and_changes_with_the_words(llava, tmp_path):
    (tmp_path / "score.txt").write_text("{question} {answer}")
    given = [
        {},
        {"typed": True},
        {"max_new_tokens": 9},
        {"templates": tmp_path},
        {"typed": True, "templates": tmp_path},
        {"url": "http://localhost:1"},
        {"url": "http://localhost:1", "templates": tmp_path},
    ]
    lazy = [lazy_critic(llava, **options) for options in given]
    assert len({one.identity for one in lazy}) == len(given)
    assert lazy_critic("pocket", typed=True).identity not in {one.identity for one in lazy}
    for one in lazy[:5]:
        assert one.load().identity == one.identity
