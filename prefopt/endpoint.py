"""A model behind HTTP: JSON requests that survive a busy server, a restarted one and a bad line.

Connection errors, timeouts, 429 and 5xx are retried, after waits that double and vary (or as long as
Retry-After asks); anything else is final. A server that has never answered gets two retries only, so that a
wrong address is known at once. An answer is bounded in time, however slowly its bytes come, and in size. The
API key comes from the environment alone: PREFOPT_API_KEY, or OPENAI_API_KEY. It is never logged, it is
removed from every message that quotes a server, and redirects are errors, so that it reaches no other host.
"""

import json
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx2

from prefopt.errors import InputError

logger = logging.getLogger(__name__)

KEYS = ("PREFOPT_API_KEY", "OPENAI_API_KEY")
ABSENT = (404, 405, 501)  # what a server says to a route that it does not have
LONGEST_ADDRESS = 400  # characters: with a longer one no message could name it
LONGEST_WAIT = 30.0  # seconds between two tries of a server that does not say how long
LONGEST_OBEYED = 600.0  # seconds that a Retry-After may ask for
_OF_THE_WIRE = ("content-encoding", "content-length", "transfer-encoding")  # not of the decoded answer

Item = TypeVar("Item")
Result = TypeVar("Result")


class Refused(InputError):
    """The server answered, and a retry would be answered the same; `status` is the HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unfit(InputError):
    """An answer of another form than the one requested."""


class Endpoint:
    """A server's address, with or without `/v1` at its end, and the patience with it.

    `retries` is how often one request is retried, `timeout` the seconds that a whole answer may take,
    `first_wait` the seconds before the first retry, `max_bytes` the largest answer.
    """

    def __init__(
        self,
        url: str,
        *,
        retries: int = 10,
        timeout: float = 300.0,
        first_wait: float = 0.5,
        max_bytes: int = 8 * 2**20,
    ):
        self.url = _checked(url)
        self.retries, self.timeout, self.max_bytes = retries, timeout, max_bytes
        self.first_wait = first_wait
        self._key = _key()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            follow_redirects=False,
        )
        weakref.finalize(self, self._client.close)
        self._answered = False

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Result]) -> Result:
        """What `read` returns for the server's JSON answer.

        Refused after a final HTTP error, Unfit if `read` raises it, InputError if the server is out of reach.
        """
        url, tried = f"{self.url}{path}", 0
        while True:
            after = None
            try:
                response = self._response(url, body)
            except httpx2.DecodingError as error:
                self._answered = True
                raise InputError(f"{url} answered what cannot be decompressed: {error}") from error
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                self._answered = True
                if response.status_code != 429 and (
                    response.status_code < 500 or response.status_code == 501
                ):
                    return self._read(response, url, read)
                problem, after = self._status(response), retry_after(response.headers.get("Retry-After"))
            if tried == (self.retries if self._answered else min(self.retries, 2)):
                raise InputError(
                    f"gave up on {url} after {tried + 1} tries; the last error was "
                    f"{self.without_key(problem)}. "
                    "Is the server running, and is this its address?"
                )
            wait = min(LONGEST_WAIT, self.first_wait * 2**tried) * random.uniform(0.5, 1.0)
            tried += 1
            logger.info("%s: %s; try %d follows", url, self.without_key(problem), tried + 1)
            time.sleep(wait if after is None else min(after, LONGEST_OBEYED))

    def _response(self, url: str, body: dict[str, Any]) -> httpx2.Response:
        """The whole answer, or an error once it takes too long or grows too large."""
        outcome = SimpleQueue[httpx2.Response | Exception]()

        def receive() -> None:
            try:
                outcome.put(self._received(url, body))
            except Exception as error:
                outcome.put(error)

        # A thread that can be left behind: the client's own time-outs are between two bytes of a header.
        threading.Thread(target=receive, daemon=True).start()
        try:
            result = outcome.get(timeout=self.timeout)
        except Empty:
            raise self._too_slow() from None
        if isinstance(result, Exception):
            raise result
        return result

    def _received(self, url: str, body: dict[str, Any]) -> httpx2.Response:
        end, content = time.monotonic() + self.timeout, bytearray()
        with self._client.stream("POST", url, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > self.max_bytes:
                    raise InputError(
                        f"{url} answered more than {self.max_bytes} bytes; is it the right address?"
                    )
                if time.monotonic() > end:
                    raise self._too_slow()
        headers = {k: v for k, v in response.headers.items() if k.lower() not in _OF_THE_WIRE}
        return httpx2.Response(response.status_code, headers=headers, content=bytes(content))

    def _too_slow(self) -> httpx2.ReadTimeout:
        return httpx2.ReadTimeout(f"no whole answer within {self.timeout:g} s")

    def _read(self, response: httpx2.Response, url: str, read: Callable[[dict[str, Any]], Result]) -> Result:
        if response.is_redirect:
            target = self.without_key(response.headers.get("Location", "elsewhere"))
            raise Refused(
                f"{url} redirects to {target}; name that address itself if you trust it", response.status_code
            )
        if not response.is_success:
            hint = (
                " Set PREFOPT_API_KEY to a key that it accepts." if response.status_code in (401, 403) else ""
            )
            raise Refused(f"{url} answered {self._status(response)}.{hint}", response.status_code)
        try:
            answer = json.loads(response.content, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            reason = "lists in lists, too deep to be read" if deep else self.without_key(str(error))[:100]
            answer, reason = None, f" ({reason})"
        else:
            reason = ""
        if not isinstance(answer, dict):
            raise InputError(f"{url} answered {self._status(response)}, which is no JSON object{reason}")
        try:
            return read(answer)
        except Unfit as error:
            raise Unfit(self.without_key(str(error))[:400]) from None  # its traceback would show the key

    def _status(self, response: httpx2.Response) -> str:
        """Status and the start of the body, in one line."""
        text = " ".join(response.text.split())
        return self.without_key(f"{response.status_code} {response.reason_phrase}: {text}")[:400]

    def without_key(self, text: str) -> str:
        """The text with the API key, as it is or as addresses, JSON and Python spell it, made `[key]`."""
        for spelled in (
            {self._key, quote(self._key, safe=""), json.dumps(self._key)[1:-1], repr(self._key)[1:-1]}
            if self._key
            else ()
        ):
            text = text.replace(spelled, "[key]")
        return text


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], concurrency: int) -> list[Result]:
    """The results of `work` for each item, in order; after a first error no further item is started."""
    errors: list[BaseException] = []

    def unless_failed(item: Item) -> Result | None:
        if errors:
            return None
        try:
            return work(item)
        except BaseException as error:
            errors.append(error)
            return None

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            results = list(pool.map(unless_failed, items))
        except BaseException as interrupt:  # Ctrl-C, which the threads do not see
            errors.append(interrupt)
            raise
    if errors:
        raise errors[0]
    return cast(list[Result], results)


def chat_text(body: Mapping[str, Any]) -> tuple[str, bool]:
    """A chat completion's text, and whether it ended by itself, not at its longest length.

    A half of a surrogate pair, which no file could hold, becomes a question mark.
    """
    try:
        choice = body["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError) as error:
        raise Unfit(f"{dict(body)} is no chat completion") from error
    if not isinstance(content, str | None):
        raise Unfit(f"the content of its message is no text, but {content}")
    return (content or "").encode(errors="replace").decode(), reason != "length"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for one that gives two values for one name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


def retry_after(header: str | None) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None without one."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without its time zone
        return None


def _key() -> str | None:
    """The API key of the environment, if there is one."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"{name} is no key: it holds a space, or a character that no header may hold"
                )
            return key
    return None


def _checked(url: str) -> str:
    """The address without its `/v1`, so that full paths can follow."""
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise InputError(
            "the server's address holds a user or a key; put the key into PREFOPT_API_KEY instead"
        )
    if len(url) > LONGEST_ADDRESS:
        raise InputError(
            f"{url[:60]!r}... is no address of a server: it has {len(url)} characters, and {LONGEST_ADDRESS} "
            "are the most"
        )
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"{url!r} is no address of a server: {error}") from error
    labels = parts.raw_host.removesuffix(b".").split(b".")
    is_host = all(0 < len(label) < 64 for label in labels) and len(parts.raw_host) < 255
    is_port = parts.port is None or 0 < parts.port < 2**16
    is_plain = not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not (is_host and is_port and is_plain):
        raise InputError(f"{url!r} is no address of a server; name one such as http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
