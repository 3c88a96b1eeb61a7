"""Servers: addresses that are none, answers that break HTTP, that break JSON, or that are no answers."""

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from damage import NESTED
from trial import Trial, program
from world import World

ADDRESSES = {
    "nothing": "",
    "a word": "localhost",
    "without a scheme": "localhost:8000",
    "of a file": "file:///etc/hosts",
    "without a host": "http://",
    "with a label of 64 characters": f"http://{'a' * 64}.example",
    "with a host of 5,000 characters": f"http://{'a.' * 2500}example",
    "with an empty label": "http://a..example",
    "of a dot": "http://.",
    "of no IDNA": "http://\u2603.example",
    "of a long IDNA": "http://" + 70 * "\u00e9" + ".example",
    "with half a surrogate": "http://\ud800.example",
    "with a NUL": "http://a\0b",
    "with port 99999": "http://localhost:99999",
    "with port 0": "http://localhost:0",
    "with port -1": "http://localhost:-1",
    "with port x": "http://localhost:x",
    "with half an IPv6": "http://[::1",
    "with no IPv4": "http://256.256.256.256",
    "with a query": "http://localhost:8000?key=1",
    "with a fragment": "http://localhost:8000#x",
    "with a user": "http://me:secret@localhost:8000",
    "with a path of 100,000 characters": f"http://localhost/{'a' * 100_000}",
}


def answer(body: bytes, *headers: str, status: str = "200 OK") -> list[bytes]:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return ["\r\n".join(lines).encode(), body]


def without_end(beginning: bytes, piece: bytes, pause: float = 0.0) -> Iterator[bytes]:
    """A beginning, and then the same piece again and again."""
    yield beginning
    while True:
        yield piece
        time.sleep(pause)


def packed(megabytes: int) -> bytes:
    """A gzip of so many megabytes of zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first, again = (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (megabytes - 1) + packer.flush()


def bomb() -> list[bytes]:
    """400 MB in one gzip."""
    return answer(packed(400), "Content-Encoding: gzip")


def bomb_in_a_bomb() -> list[bytes]:
    """40 GB in a gzip of a gzip."""
    return answer(gzip.compress(packed(40_000)), "Content-Encoding: gzip, gzip")


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# What the server sends -> what the message says.
WIRE: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: [], "gave up on"),
    "no HTTP": (lambda: [b"hello\r\n\r\n"], "gave up on"),
    "a status of letters": (lambda: [b"HTTP/1.1 abc OK\r\n\r\n"], "gave up on"),
    "half an answer": (lambda: [answer(b"{}" * 100)[0], b"{}"], "gave up on"),
    "headers without end": (lambda: without_end(OK, b"X-More: to come\r\n"), "gave up on"),
    "headers that drip": (lambda: without_end(OK, b"X-More: to come\r\n", 0.05), "no whole answer within"),
    "a header without end": (lambda: without_end(OK + b"X: ", b"a" * 1000), "gave up on"),
    "bytes that drip": (lambda: without_end(OK + b"\r\n", b" ", 0.05), "no whole answer within"),
    "a body without end": (lambda: without_end(OK + b"\r\n", bytes(2**16)), "more than .* bytes"),
    "chunks without end": (
        lambda: without_end(CHUNKED, b"4\r\nabcd\r\n"),
        "(more than .* bytes|no whole answer)",
    ),
    "a chunk of no size": (lambda: [CHUNKED, b"xyz\r\nabcd\r\n"], "gave up on"),
    "1xx without end": (lambda: without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "gave up on"),
    "a length that is negative": (lambda: [OK, b"Content-Length: -5\r\n\r\n"], "gave up on"),
    "two lengths": (lambda: [OK, b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n{}"], "gave up on"),
    "gzip that is none": (lambda: answer(b"{}", "Content-Encoding: gzip"), "decompressed"),
    "half a gzip": (
        lambda: answer(gzip.compress(b"{}" * 999)[:20], "Content-Encoding: gzip"),
        "(decompressed|no JSON object)",
    ),
    "deflate that is none": (
        lambda: answer(b"{}", "Content-Encoding: deflate"),
        "(decompressed|no JSON object)",
    ),
    "an unknown encoding": (lambda: answer(b"\x01\x02", "Content-Encoding: snow"), "no JSON object"),
    "400 MB in a gzip": (bomb, "more than .* bytes"),
    "40 GB in a gzip in a gzip": (bomb_in_a_bomb, "more than .* bytes"),
    "204": (lambda: answer(b"", status="204 No Content"), "204"),
    "a redirect to itself": (lambda: answer(b"", "Location: /", status="302 Found"), "redirects to /"),
    "a redirect to nowhere": (lambda: answer(b"", status="307 Temporary Redirect"), "redirects to elsewhere"),
    "a redirect to no address": (
        lambda: answer(b"", "Location: http://[", status="301 Moved Permanently"),
        r"redirects to http://\[",
    ),
    "401": (lambda: answer(b"who?", status="401 Unauthorized"), "PREFOPT_API_KEY"),
    "418": (lambda: answer(b"<html>" * 9999, status="418 I'm a teapot"), "418"),
    "500": (lambda: answer(b"\xff" * 9999, status="500 Oh"), "gave up on .* the last error was 500"),
    "429 and a date": (
        lambda: answer(b"", "Retry-After: yesterday", status="429 No"),
        "the last error was 429",
    ),
    "999": (lambda: answer(b"", status="999 What"), "999"),
    "a web page": (lambda: answer(b"<html></html>", "Content-Type: text/html"), "no JSON object"),
    "bytes that are no text": (lambda: answer(bytes(range(256))), "no JSON object"),
    "text of another charset": (
        lambda: answer('{"\u00e9": 1}'.encode("latin-1"), "Content-Type: application/json; charset=utf-8"),
        "no JSON object",
    ),
    "an unknown charset": (
        lambda: answer(b"<>", "Content-Type: text/html; charset=\x00zz"),
        "(no JSON|gave up)",
    ),
    "brackets nested too deep": (lambda: answer(b"[" * NESTED), "no JSON object"),
    "objects nested too deep": (lambda: answer(b'{"a":' * NESTED), "no JSON object"),
    "a number of 100,000 digits": (lambda: answer(b'{"answers": ' + b"9" * 100_000 + b"}"), "no JSON object"),
    "one name twice": (lambda: answer(b'{"answers": 1, "answers": 2}'), "'answers' twice"),
    **{
        f"the JSON {text}": (lambda text=text: answer(text.encode()), "no JSON object")
        for text in ("", "{", "[]", "null", "17", "NaN", '"text"', "{}}", "{'a': 1}")
    },
}

PREDICATE = (
    {"answers": {"q": {"noul": "VALUE"}}},
    {"answers": [{"type": "predicate", "probability": "VALUE"}]},
)
NUMBERS = {
    "text": '"yes"',
    "a true": "true",
    "a null": "null",
    "a list": "[0.5]",
    "an object": "{}",
    "NaN": "NaN",
    "an infinity": "-Infinity",
    "minus one": "-1",
    "two": "2",
    "400 digits": "1" + "0" * 400,
    "1e999": "1e999",
}
CHATS = {
    "no choices": "{}",
    "null choices": '{"choices": null}',
    "empty choices": '{"choices": []}',
    "choices of text": '{"choices": "abc"}',
    "choices of numbers": '{"choices": [1]}',
    "choices by name": '{"choices": {"0": {}}}',
    "no message": '{"choices": [{}]}',
    "a null message": '{"choices": [{"message": null}]}',
    "a message of text": '{"choices": [{"message": "yes"}]}',
    "a content of numbers": '{"choices": [{"message": {"content": 17}}]}',
    "a content in blocks": '{"choices": [{"message": {"content": [{"type": "text", "text": "yes"}]}}]}',
    "a choice that is a list": '{"choices": [[]]}',
}
LOGPROBS = {
    "null": "null",
    "of text": '"-1"',
    "without content": "{}",
    "with an empty content": '{"content": []}',
    "with a null content": '{"content": null}',
    "with no list": '{"content": [{"top_logprobs": {"yes": -1}}]}',
    "with an empty list": '{"content": [{"top_logprobs": []}]}',
    "that are positive": '{"content": [{"top_logprobs": [{"token": "Yes", "logprob": 5}]}]}',
    "that are NaN": '{"content": [{"top_logprobs": [{"token": "Yes", "logprob": NaN}]}]}',
    "that are text": '{"content": [{"top_logprobs": [{"token": "Yes", "logprob": "high"}]}]}',
    "that are null": '{"content": [{"top_logprobs": [{"token": "Yes", "logprob": null}]}]}',
    "of 400 digits": '{"content": [{"top_logprobs": [{"token": "Yes", "logprob": 1' + "0" * 400 + "}]}]}",
    "without tokens": '{"content": [{"top_logprobs": [{"logprob": -1}]}]}',
}


def trials(world: World) -> Iterator[Trial]:
    """Addresses, then what comes back."""
    for what, address in ADDRESSES.items():
        yield Trial(f"an address {what}", lambda _, address=address: connect(address), ("address",))
    for what, (sent, said) in WIRE.items():
        yield Trial(f"a server that sends {what}", asking("systemone", sent), (r"127\.0\.0\.1", said))
    yield from bodies()
    for what in ("brackets nested too deep", "half an answer", "a redirect to itself"):
        sent, said = WIRE[what]
        yield Trial(f"a build whose judge sends {what}", building(world, sent), (r"127\.0\.0\.1", said))


def bodies() -> Iterator[Trial]:
    """JSON that is no answer to the question, by dialect."""
    for what, value in NUMBERS.items():
        for api, form in zip(("systemone", "decisions"), PREDICATE, strict=True):
            text = json.dumps(form).replace('"VALUE"', value)
            yield Trial(
                f"{api} with the probability {what}", asking(api, body(text)), (r"127\.0\.0\.1", "probabilit")
            )
    for what, text in CHATS.items():
        yield Trial(
            f"a chat with {what}", asking("text", body(text)), (r"127\.0\.0\.1", "(chat completion|no text)")
        )
    for what, value in LOGPROBS.items():
        text = f'{{"choices": [{{"message": {{"content": "Yes"}}, "logprobs": {value}}}]}}'
        yield Trial(
            f"log-probabilities {what}", asking("logprobs", body(text)), (r"127\.0\.0\.1", "log-prob")
        )
    half = '{"choices": [{"message": {"content": "No, \\ud800"}}]}'
    yield Trial("a chat with half a surrogate", asking("text", body(half)), check=lambda _: None)
    for form in (
        '{"answers": []}',
        '{"answers": [17]}',
        '{"answers": [{"type": "score"}]}',
        '{"answers": {"q": null}}',
    ):
        for api in ("systemone", "decisions"):
            yield Trial(f"{api} that says {form}", asking(api, body(form)), (r"127\.0\.0\.1", "answer"))


def body(text: str) -> Callable[[], list[bytes]]:
    """An answer of JSON."""
    return lambda: answer(text.encode(), "Content-Type: application/json")


def connect(address: str) -> None:
    from prefopt.endpoint import Endpoint

    Endpoint(address, retries=0, timeout=2).post("/v1/systemone", {}, dict)


def asking(api: Any, sent: Callable[[], Any]) -> Callable[[Path], None]:
    """Ask a judge behind a server that sends this to everyone."""

    def act(_: Path) -> None:
        from PIL import Image

        from prefopt.judges.endpoint import EndpointJudge
        from prefopt.judges.questions import Case, Question

        judge = EndpointJudge(serve(sent), "model", api=api, retries=0, timeout=3, first_wait=0.01)
        judge.answer([Case(Image.new("RGB", (8, 8)), "a lion", (Question("q", "Is it?"),))])

    return act


def building(world: World, sent: Callable[[], Any]) -> Callable[[Path], None]:
    """Build pairs with a judge behind such a server."""

    def act(folder: Path) -> None:
        options = world.options("text_to_image_pairs") | {"judge_url": serve(sent)}
        program("text_to_image_pairs", options)(folder)

    return act


def serve(sent: Callable[[], Any]) -> str:
    """The address of a server on this machine that sends the same to everyone, until this process ends."""
    listening = socket.create_server(("127.0.0.1", 0))

    def each(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(2**20)
            for piece in sent():
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**20):
                pass

    def accept() -> None:
        while True:
            threading.Thread(target=each, args=listening.accept()[:1], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"
