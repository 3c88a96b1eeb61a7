"""Servers for tests: a scripted one of this process, and `transformers serve` as a user starts it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2

# What a route answers to (body, number of the call): a body of JSON; or status, headers and text, which may
# come piece by piece without an end.
Route = Callable[[dict, int], dict | tuple[int, dict, str | bytes | Iterable[str]]]


@dataclass
class Scripted:
    """A server whose routes are functions; a route that it does not have is a 404."""

    routes: dict[str, Route]
    calls: list[tuple[str, dict, dict]] = field(default_factory=list)  # path, body, headers

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def bodies(self, path: str) -> list[dict]:
        return [body for called, body, _ in self.calls if called == path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        script, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(script.bodies(self.path))
                    script.calls.append((self.path, body, dict(self.headers)))
                route = script.routes.get(self.path, lambda *_: (404, {}, "no such route"))
                said = route(body, number)
                status, headers, text = said if isinstance(said, tuple) else (200, {}, json.dumps(said))
                if status == 0:  # the line breaks
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if isinstance(text, str | bytes):
                    whole = text.encode() if isinstance(text, str) else text
                    self.send_header("Content-Length", str(len(whole)))
                    pieces = [whole]
                else:
                    pieces = (piece.encode() for piece in text)
                self.end_headers()
                with suppress(ConnectionError):
                    for piece in pieces:
                        self.wfile.write(piece)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@dataclass
class TransformersServe:
    """`transformers serve` of one model folder on a port of its own."""

    model: str
    log: Path
    port: int = 0

    def start(self, seconds: float = 600) -> None:
        """Return when it answers."""
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
        end = time.monotonic() + seconds
        while not self._is_up():
            alive = self._process.poll() is None
            assert alive and time.monotonic() < end, f"it never came up:\n{self.log.read_text()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9"""
        self._process.kill()
        self._process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def served(self) -> int:
        """Questions answered so far, as its log counts them."""
        return self.log.read_text().count('POST /v1/systemone HTTP/1.1" 200')

    def _is_up(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health").is_success
        except httpx2.TransportError:
            return False


def chat(text: str | None, finish_reason: str = "stop", **logprobs: Any) -> dict:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"object": "chat.completion", "choices": [choice | logprobs]}
