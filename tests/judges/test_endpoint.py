"""The judge behind HTTP: against transformers serve, and against scripted servers of the other dialects."""

import base64
import gzip
import io
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from math import exp, log

import pytest
from PIL import Image
from servers import Scripted, TransformersServe, chat
from tiny_vlm import picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.decision.configuration_utils import DecisionConfig
from transformers.decision.template_utils import DECISION_PROMPT
from transformers.decision.template_utils import Question as Parsed
from transformers.pipelines import DecisionPipeline
from transformers.utils.chat_template_utils import _compile_jinja_template

from prefopt import endpoint, pocket
from prefopt.endpoint import Endpoint, in_parallel, retry_after
from prefopt.errors import InputError
from prefopt.judges.dialects import CERTAIN, DIALECTS, read_text, read_tokens, words
from prefopt.judges.endpoint import EndpointJudge
from prefopt.judges.questions import NO, YES, Case, Question
from prefopt.judges.rubric import Rubric

VISIBLE = Question("visible", "Is an elephant visible?")
COLOUR = Question("colour", "Which colour is it?", "choice", ("red", "green", "blue"))
QUALITY = Question("quality", "How good is it?", "score", ("bad", "fair", "good"))
TYPES = (VISIBLE, COLOUR, QUALITY)
CHAT = "/v1/chat/completions"


def asked(*questions: Question, image: int = 0, prompt: str = "a red elephant") -> Case:
    return Case(picture(image), prompt, questions or (VISIBLE,))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def llava() -> str:
    return str(pocket.folder("llava"))


@pytest.fixture(scope="module")
def served(llava, tmp_path_factory):
    server = TransformersServe(llava, tmp_path_factory.mktemp("serve") / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def at_home(llava: str, cases: list[Case]) -> list[list[dict[str, float]]]:
    """What transformers' pipeline says in this process."""
    model = AutoModelForImageTextToText.from_pretrained(llava)
    processor = AutoProcessor.from_pretrained(llava)
    decide = DecisionPipeline(model=model, tokenizer=processor.tokenizer, processor=processor)
    told = []
    choice, score = dict.fromkeys(COLOUR.options), list(QUALITY.options)
    questions = {
        "visible": {"type": "noul", "instructions": VISIBLE.text},
        "colour": {"type": "choice", "instructions": COLOUR.text, "criteria": choice},
        "quality": {"type": "score", "instructions": QUALITY.text, "criteria": score},
    }
    for case in cases:
        state = f"@1\nDescription: {case.prompt}"
        answer = decide({"state": state, "questions": questions, "assets": {"@1": case.image}})
        yes = answer["visible"]["noul"]
        levels = zip(score, answer["quality"]["probabilities"].values(), strict=True)
        told.append([{YES: yes, NO: 1 - yes}, answer["colour"]["probabilities"], dict(levels)])
    return told


def same(answers, expected) -> None:
    for case, told in zip(answers, expected, strict=True):
        for answer, probabilities in zip(case, told, strict=True):
            assert answer.probabilities == pytest.approx(probabilities, abs=1e-6) and answer.other_mass == 0


def test_transformers_serve_answers_as_the_pipeline_at_home(served, llava, caplog):
    caplog.set_level(logging.INFO, "prefopt")
    cases = [asked(*TYPES, image=i, prompt=f"{i} elephants, f/2.8 <picture> <image></s>") for i in range(3)]
    judge = EndpointJudge(served.url + "/v1/", llava)
    before = served.served()
    answers = judge.answer(cases)
    assert judge.api == "systemone" and f"{served.url} is asked as systemone" in caplog.text
    assert served.served() == before + len(cases), "one request a case"
    home = at_home(llava, cases)
    same(answers, home)
    assert abs(home[0][0][YES] - home[1][0][YES]) > 1e-4, "the images are told apart"
    rubric = Rubric.load("class_conditional").questions("elephant", "a red elephant")
    assert len(judge.answer([asked(*rubric)])[0]) == 10


def test_a_restart_in_the_middle_is_survived(served, llava, monkeypatch):
    """Guards against builds that end with their judge's server; its port stays, its process does not."""
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.5)
    cases = [asked(*TYPES, image=i, prompt=f"elephant {i}") for i in range(60)]
    judge = EndpointJudge(served.url, llava, concurrency=2, retries=400)
    before = served.served()
    work = ThreadPoolExecutor(1).submit(judge.answer, cases)
    while served.served() < before + 5:
        time.sleep(0.005)
    served.kill()
    done = served.served() - before
    assert done < len(cases)
    served.start()
    answers = work.result(600)
    assert served.served() - before >= len(cases) - 2, "no more than what was under way is lost to the log"
    same(answers[::20], at_home(llava, cases[::20]))


def test_a_dead_server_is_named_at_once():
    start = time.monotonic()
    with pytest.raises(
        InputError, match=r"http://127\.0\.0\.1:9/v1/systemone after 3 tries.*ConnectError.*running"
    ):
        EndpointJudge("http://127.0.0.1:9", "m")
    assert time.monotonic() - start < 3


def test_a_server_that_dies_is_given_up_with_its_last_error(monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.01)

    def dying(_, number):
        return (0, {}, "") if number else {"answers": {"grey": {"type": "noul", "noul": 0.5}}}

    with Scripted({"/v1/systemone": dying}) as server:
        judge = EndpointJudge(server.url, "m", retries=4)
        with pytest.raises(InputError, match=r"systemone after 5 tries; the last error was \w+Error"):
            judge.answer([asked()])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_when_it_says(status, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def busy(_, number):
        if number < 4:
            return status, {} if number < 3 else {"Retry-After": "17"}, "busy"
        return {"answers": {"visible": {"type": "noul", "noul": 0.75}}}

    with Scripted({"/v1/systemone": busy}) as server:
        judge = EndpointJudge(server.url, "m", api="systemone", first_wait=1.0)
        [[answer]] = judge.answer([asked()])
    assert answer.probabilities == {YES: 0.75, NO: 0.25}
    for i, wait in enumerate(waits[:3]):
        assert 2**i / 2 <= wait <= 2**i, "waits double, and vary"
    assert waits[3:] == [17.0]


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after("-1") == 0 and retry_after(None) is None
    assert 50 < (retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert retry_after("soon") is None and retry_after("Wed, 21 Oct 2026 07:28:00") is None


@pytest.mark.parametrize("status", [400, 401, 422])
def test_a_refusal_is_final(status):
    with Scripted({"/v1/systemone": lambda *_: (status, {}, "no such model")}) as server:
        with pytest.raises(InputError, match=rf"{server.url}/v1/systemone answered {status} .*no such model"):
            EndpointJudge(server.url, "m")
        assert len(server.calls) == 1


def test_after_a_first_error_no_further_request_is_begun():
    begun = []

    def work(item):
        begun.append(item)
        raise InputError("first")

    with pytest.raises(InputError, match="first"):
        in_parallel(work, range(500), 2)
    assert len(begun) <= 2


def refusal(route):
    """What is raised when a server so answers, and what it was asked."""
    with Scripted({"/v1/systemone": route}) as server, pytest.raises(InputError) as error:
        EndpointJudge(server.url, "m", retries=1)
    return str(error.value), server.calls


def test_an_api_key_stays_between_us_and_its_server(monkeypatch, caplog):
    """Guards against keys in logs, in quoted errors, and on other hosts after a redirect."""
    key = "sk-a-secret-of-the-environment"
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("PREFOPT_API_KEY", f"{key}\n")
    with Scripted({}) as other:
        to_other = {"Location": f"{other.url}/v1/systemone"}
        message, called = refusal(lambda *_: (307, to_other, ""))
    assert f"redirects to {other.url}" in message and not other.calls
    assert called[0][2]["Authorization"] == f"Bearer {key}"
    message, _ = refusal(lambda *_: (401, {}, f"wrong key {key}"))
    assert "wrong key [key]" in message and "PREFOPT_API_KEY" in message and key not in message
    message, _ = refusal(lambda *_: (503, {"Retry-After": "0"}, f"busy with {key}"))
    assert "busy with [key]" in message and key not in message + caplog.text
    with Scripted({}) as other:
        to_other = {"Location": f"{other.url}/v1/systemone?token={key}"}
        message, _ = refusal(lambda *_: (307, to_other, ""))
    assert f"redirects to {other.url}/v1/systemone?token=[key]" in message
    message, _ = refusal(lambda *_: {"answers": f"a list of {key}"})
    assert "a list of [key]" in message and key not in message
    monkeypatch.setenv("PREFOPT_API_KEY", "two\nlines")
    with pytest.raises(InputError, match="PREFOPT_API_KEY is no key") as bad:
        Endpoint("http://127.0.0.1:9")
    assert "lines" not in str(bad.value)


@pytest.mark.parametrize("key", ["noul", "0.75", "visible"])
def test_a_short_key_leaves_answers_as_they_are(monkeypatch, key):
    monkeypatch.setenv("PREFOPT_API_KEY", key)
    with Scripted(
        {"/v1/systemone": lambda *_: {"answers": {"visible": {"type": "noul", "noul": 0.75}}}}
    ) as it:
        [[answer]] = EndpointJudge(it.url, "m", api="systemone").answer([asked()])
    assert answer.probabilities == {YES: 0.75, NO: 0.25}


def test_a_key_at_the_end_of_what_is_quoted_is_not_cut_in_two(monkeypatch):
    monkeypatch.setenv("PREFOPT_API_KEY", "sk-a-secret-of-the-environment")
    for length in range(80, 420, 20):
        with (
            Scripted(
                {
                    "/v1/systemone": lambda *_, n=length: {
                        "answers": "x" * n + "sk-a-secret-of-the-environment"
                    }
                }
            ) as it,
            pytest.raises(InputError) as error,
        ):
            EndpointJudge(it.url, "m", api="systemone").answer([asked()])
        assert "sk-a" not in str(error.value)


def drip():
    while True:
        yield " "
        time.sleep(0.05)


def flood():
    while True:
        yield " " * 2**16


def test_an_answer_that_drips_is_given_up_in_time():
    """Guards: a time-out between two bytes, which an answer without an end never reaches."""
    start = time.monotonic()
    with Scripted({"/v1/systemone": lambda *_: (200, {}, drip())}) as server:
        slow = Endpoint(server.url, timeout=0.3, retries=1, first_wait=0.01)
        with pytest.raises(InputError, match=r"after 2 tries; .*no whole answer within 0\.3 s"):
            slow.post("/v1/systemone", {}, dict)
    assert time.monotonic() - start < 5


def test_headers_that_drip_are_given_up_in_time():
    def serve():
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not ended.wait(0.05):
                connection.sendall(b"X-More: to come\r\n")

    ended, start = threading.Event(), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve)
        server.start()
        slow = Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5, retries=0)
        with pytest.raises(InputError, match=r"no whole answer within 0\.5 s"):
            slow.post("/v1/systemone", {}, dict)
        assert time.monotonic() - start < 3
        ended.set()
        server.join()


def test_an_answer_without_an_end_is_given_up_at_a_size():
    with Scripted({"/v1/systemone": lambda *_: (200, {}, flood())}) as server:
        endpoint = Endpoint(server.url, max_bytes=10**6)
        with pytest.raises(InputError, match="answered more than 1000000 bytes; is it the right address"):
            endpoint.post("/v1/systemone", {}, dict)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("headers", "content", "said"),
    [
        ({}, b"[" * 100_000, "no JSON object .*too deep to be read"),
        ({}, b'{"a":' * 100_000, "no JSON object .*too deep to be read"),
        ({}, b'{"a": ' + b"9" * 5000 + b"}", "no JSON object"),
        ({}, b'{"a": 1, "a": 2}', "'a' twice"),
        ({}, b'{"a": "\xff"}', "no JSON object .*utf-8"),
        ({"Content-Encoding": "gzip"}, b"{}", "cannot be decompressed"),
        ({"Content-Encoding": "gzip"}, gzip.compress(bytes(10**7)), "more than 1000000 bytes"),
    ],
    ids=["brackets", "objects", "digits", "twice", "no text", "no gzip", "a bomb"],
)
def test_an_answer_that_is_no_object_is_refused(headers, content, said):
    with (
        Scripted({"/v1/systemone": lambda *_: (200, headers, content)}) as server,
        pytest.raises(InputError, match=f"(?s){server.url}.*{said}"),
    ):
        Endpoint(server.url, max_bytes=10**6).post("/v1/systemone", {}, dict)
    assert len(server.calls) == 1


NO_ADDRESSES = ["localhost:8000", "ftp://a", "http://", "http://a:b", "http://a/?key=1", ""]
NO_ADDRESSES += ["http://a..b", f"http://{'a' * 64}.b", "http://a:99999", f"http://a/{'b' * 400}"]


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(InputError, match="no address of a server"):
        Endpoint(url)


@pytest.mark.parametrize("content", [17, ["yes"], {"type": "text"}])
def test_a_chat_whose_content_is_no_text_is_unfit(content):
    with pytest.raises(endpoint.Unfit, match="is no text"):
        endpoint.chat_text({"choices": [{"message": {"content": content}}]})


def test_half_of_a_surrogate_pair_becomes_a_question_mark():
    """Guards: an answer that no file can hold, found when it is written."""
    assert endpoint.chat_text(chat("no\ud800")) == ("no?", True)
    assert endpoint.chat_text(chat(None)) == ("", True)


@pytest.mark.parametrize(
    "probabilities", [5, {"value": "red"}, ["red"], [{"value": [], "probability": 1}], [None]]
)
def test_probabilities_that_are_none_are_unfit(probabilities):
    answer = {"type": "choice", "name": "colour", "probabilities": probabilities}
    with pytest.raises(endpoint.Unfit):
        DIALECTS["decisions"].read((COLOUR,), {"answers": [answer]})


@pytest.mark.parametrize("number", [10**400, 1e308, float("nan"), -1, "1", True, None])
def test_numbers_that_are_no_probabilities_are_unfit(number):
    answers = {"answers": {"colour": {"probabilities": dict.fromkeys(("red", "green", "blue"), number)}}}
    with pytest.raises(endpoint.Unfit, match="the probabilities of colour are"):
        DIALECTS["systemone"].read((COLOUR,), answers)


def test_a_key_inside_of_an_address_is_refused_and_not_repeated():
    with pytest.raises(InputError, match="PREFOPT_API_KEY") as error:
        Endpoint("http://me:secret@host:port")
    assert "secret" not in str(error.value)


def decisions(body, _):
    """A server of OpenAI's decisions, by its SDK's types."""
    answers = []
    for question in body["questions"]:
        if question["type"] == "predicate":
            answers.append({"type": "predicate", "name": question["name"], "probability": 0.9})
        elif question["type"] == "choice":
            values = [choice["value"] for choice in question["choices"]]
            shares = [
                {"value": v, "probability": p} for v, p in zip(values[::-1], (0.2, 0.1, 0.7), strict=True)
            ]
            answers.append({"type": "choice", "choice": "red", "confidence": 0.5, "probabilities": shares})
        else:
            shares = [
                {"label": level["label"], "value": i, "probability": p}
                for i, (level, p) in enumerate(zip(question["levels"], (0.5, 0.25, 0.25), strict=True))
            ]
            answers.append(
                {"type": "score", "name": None, "score": 0.75, "confidence": 0.5, "probabilities": shares}
            )
    return {"model": body["model"], "answers": answers, "usage": {}}


def test_decisions_are_asked_and_read_in_their_types():
    from openai.types.decision import Answer
    from openai.types.decision_create_params import DecisionCreateParams
    from pydantic import TypeAdapter

    with Scripted({"/v1/decisions": decisions}) as server:
        judge = EndpointJudge(server.url, "gpt")
        answers = judge.answer([asked(*TYPES), asked(QUALITY, image=1)])
    assert judge.api == "decisions" and [path for path, *_ in server.calls][:1] == ["/v1/systemone"]
    bodies = server.bodies("/v1/decisions")
    assert len(bodies) == 3, "the probe, and one request a case"
    for body in bodies:
        TypeAdapter(DecisionCreateParams).validate_python(body, strict=True, extra="forbid")
        TypeAdapter(list[Answer]).validate_python(decisions(body, 0)["answers"])
    image = next(body for body in bodies if len(body["questions"]) == 3)["input"][0]["content"][0][
        "image_url"
    ]
    with Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/png;base64,")))) as seen:
        assert seen.tobytes() == picture(0).tobytes()
    assert answers[0][0].probabilities == pytest.approx({YES: 0.9, NO: 0.1})
    assert answers[0][1].probabilities == {"red": 0.7, "green": 0.1, "blue": 0.2}
    assert answers[0][2] == answers[1][0] and answers[1][0].verdict == "bad"


def test_a_decision_refused_says_nothing():
    refusal = {"answers": [{"type": "refusal", "name": "visible"}]}
    with Scripted({"/v1/decisions": lambda *_: refusal}) as server:
        judge = EndpointJudge(server.url, "m", api="decisions")
        [[answer]] = judge.answer([asked()])
    assert answer.verdict is None and answer.other_mass == 1 and judge.unreadable == 1


def tokens(*listed: tuple[str, float]) -> dict:
    top = [{"token": token, "logprob": log(p), "bytes": None} for token, p in listed]
    return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def test_chat_with_log_probabilities_sums_variants_and_sees_what_leaks():
    listed = (("Yes", 0.5), (" yes", 0.1), ("No", 0.15), ("The", 0.2), ("YES.", 0.0125))
    with Scripted({CHAT: lambda *_: chat("Yes", **tokens(*listed))}) as server:
        judge = EndpointJudge(server.url, "m")
        [[first, second]] = judge.answer([asked(VISIBLE, Question("other", "Is it red?"))])
    assert judge.api == "logprobs" and first == second
    assert first.probabilities[YES] == pytest.approx(0.6125 / 0.7625)
    assert first.other_mass == pytest.approx(0.2375)
    body = server.bodies(CHAT)[-1]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
    assert len(server.bodies(CHAT)) == 3, "the probe, and one request a question"


def test_tokens_of_letters_and_of_nothing():
    answer = read_tokens(COLOUR, [(" B", log(0.6)), ("a", log(0.2)), ("A.", log(0.1))])
    shares = {"red": 1 / 8, "green": 6 / 8, "blue": 1 / 8}  # C, which is not listed: at most the last's 0.1
    assert answer.probabilities == pytest.approx(shares)
    assert answer.other_mass == pytest.approx(0.3)
    assert read_tokens(VISIBLE, [("The", log(0.9))]).verdict is None
    sure = read_tokens(VISIBLE, [("Yes", 0.0)])
    assert sure.probabilities[NO] == pytest.approx(CERTAIN) and exp(-sure.log_odds) == pytest.approx(CERTAIN)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1. Yes,", YES),
        ("Sure, here is my answer:\n1. No", NO),
        ("Looking at the picture:\n\n**Yes**, there is no abnormality.", YES),
        ("- no", NO),
        ("(3) NO.", NO),
        ("Answer: yes", YES),
        ("No problem! Yes.", YES),
        ("Yes and no", None),
        ("Yes/No", None),
        ("Yes. No.", None),
        ("1. Yes, 2. No, 3. Yes", None),
        ("It is a zebra, no?", None),
        ("The legs look fine", None),
        ("I cannot say whether it is yes or no.", None),
        ("", None),
    ],
)
def test_a_text_is_read_strictly(text, verdict):
    """Guards against SRT2I's reading: '1. Yes,' was no answer, and a preamble shifted all that followed."""
    answer = read_text(VISIBLE, text)
    assert answer.verdict == verdict and answer.other_mass == (verdict is None)
    assert answer.log_odds == pytest.approx({YES: 16.1, NO: -16.1, None: 0.0}[verdict], abs=0.1)


def test_letters_and_options_are_read_from_texts():
    assert read_text(COLOUR, "B").verdict == read_text(COLOUR, "b. Green").verdict == "green"
    assert read_text(COLOUR, "The answer is: C) blue").verdict == "blue"
    assert read_text(COLOUR, "A. green").verdict is None, "letter and words disagree"
    assert read_text(QUALITY, "a good one").verdict is None


def test_text_is_the_last_way_and_what_cannot_be_read_is_counted(caplog):
    """Guards against SRT2I's and UnifiedReward's reading of what is no answer as one."""
    said = {"Is an elephant visible?": "Sure!\n1. Yes,", "Which?": "Hard to say.", "Is it red?": "no"}

    def route(body, _):
        if "logprobs" in body:
            return 400, {}, "logprobs are not supported"
        text = body["messages"][0]["content"][1]["text"]
        return chat(next((answer for question, answer in said.items() if question in text), "Yes"))

    questions = [Question(text, text) for text in said]
    with Scripted({CHAT: route}) as server:
        judge = EndpointJudge(server.url, "m")
        assert judge.api == "text" and "is asked as text, because" in caplog.text
        for _ in range(2):
            [answers] = judge.answer([asked(*questions)])
    assert [answer.verdict for answer in answers] == [YES, None, NO]
    assert (judge.answered, judge.unreadable) == (6, 2) and "2 of 6 answers" in caplog.text


def test_log_probabilities_that_are_ignored_lead_to_text():
    """As transformers serve ignores them."""
    with Scripted({CHAT: lambda *_: chat("Yes")}) as server:
        assert EndpointJudge(server.url, "m").api == "text"
        with pytest.raises(InputError, match="no log-probabilities"):
            EndpointJudge(server.url, "m", api="logprobs").answer([asked()])


def test_a_server_without_any_way_is_named():
    with Scripted({}) as server, pytest.raises(InputError, match=r"no way to ask m.*systemone.*completions"):
        EndpointJudge(server.url, "m")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"answers": []},
        {"answers": {"visible": {"type": "noul"}}},
        {"answers": {"visible": {"type": "noul", "noul": "yes"}}},
        {"answers": {"visible": {"type": "noul", "noul": True}}},
        {"answers": {"visible": {"type": "noul", "noul": 1.5}}},
        (200, {}, "<html>welcome</html>"),
        (200, {}, '{"answers": {"visible": {"type": "noul", "noul": NaN}}}'),
    ],
)
def test_an_answer_of_another_form_is_no_answer(answer):
    with Scripted({"/v1/systemone": lambda *_: answer}) as server:
        judge = EndpointJudge(server.url, "m", api="systemone")
        with pytest.raises(InputError, match="/v1/systemone"):
            judge.answer([asked()])


def test_many_questions_go_in_requests_that_a_server_takes():
    def route(body, _):
        return {"answers": {name: {"type": "noul", "noul": int(name) / 200} for name in body["questions"]}}

    with Scripted({"/v1/systemone": route}) as server:
        judge = EndpointJudge(server.url, "m", api="systemone")
        [answers] = judge.answer([asked(*(Question(str(i), "?") for i in range(1, 131)))])
    assert sorted(len(body["questions"]) for body in server.bodies("/v1/systemone")) == [2, 64, 64]
    assert [answer.probabilities[YES] for answer in answers] == pytest.approx(
        [i / 200 for i in range(1, 131)]
    )


@pytest.mark.parametrize("question", TYPES, ids=lambda question: question.type)
def test_a_chat_reads_the_words_of_transformers(question):
    criteria = {"choice": dict.fromkeys(question.options), "score": list(question.options)}.get(question.type)
    form = {"type": "noul" if criteria is None else question.type, "instructions": question.text}
    parsed = Parsed.from_request(
        "name", form | ({"criteria": criteria} if criteria else {}), DecisionConfig()
    )
    template = _compile_jinja_template(DECISION_PROMPT)
    rendered = template.render(state="\nDescription: two zebras", question=parsed)
    assert words(question, "two zebras") == rendered


def test_an_identity_is_of_the_way_the_words_and_the_model():
    def identity(url, model, api):
        return EndpointJudge(url, model, api=api).identity

    assert identity("http://a", "m", "text") == identity("https://b:1/v1", "m", "text")
    others = {identity("http://a", model, api) for model in "mn" for api in ("text", "logprobs", "systemone")}
    assert len(others) == 6
