"""A loopback server that plays a judge, well or badly, as a script tells it.

A script maps a `Request` to an `Answer`; every request is kept, so that tests can count calls and read
what was sent. The answers under judgement carry their quality as text ("quality 70"), which `honest` reads.
"""

from __future__ import annotations

import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

_BLOCK = re.compile(r"<<<BEGIN (s\d+) ([^\n]*?) (\w+)>>>\n(.*?)\n<<<END \1 \2 \3>>>", re.DOTALL)


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def system(self) -> str:
        return self.body["messages"][0]["content"]

    @property
    def user(self) -> str:
        return self.body["messages"][1]["content"]

    @property
    def code(self) -> str:
        return re.findall(r"The code of this request is (\w+)\.", self.system)[0]

    @property
    def samples(self) -> dict[str, dict[str, str]]:
        """{id: {block title: text}} as a judge reads them: markers with this request's code only."""
        found: dict[str, dict[str, str]] = {}
        for name, title, code, text in _BLOCK.findall(self.user):
            if code == self.code:
                found.setdefault(name, {})[title] = text
        return found


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    reset: bool = False
    cut: bool = False


Script = Callable[[Request], Answer]


def completion(text: str | None, *, finish_reason: str = "stop", refusal: str | None = None, **more: Any) -> Answer:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "judge-2025-01-01", "choices": [choice]}
    return Answer(body={**body, "system_fingerprint": "fp_1", **more})


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, **more: Any) -> Answer:
    return Answer(status, {"error": {"message": message, **more}}, headers or {})


def quality(text: str) -> int:
    return int(re.findall(r"quality (\d+)", text)[0])


def honest_results(request: Request) -> list[dict[str, Any]]:
    results = []
    for name, blocks in request.samples.items():
        a, b = quality(blocks["answer A"]), quality(blocks["answer B"])
        verdict = "tie" if a == b else "A" if a > b else "B"
        results.append({"id": name, "score_a": a, "score_b": b, "verdict": verdict})
    return results


def honest(request: Request) -> Answer:
    return completion(json.dumps({"results": honest_results(request)}))


def prefers_a(request: Request) -> Answer:
    results = [{"id": name, "score_a": 90, "score_b": 10, "verdict": "A"} for name in request.samples]
    return completion(json.dumps({"results": results}))


def first(*answers: Answer, then: Script = honest) -> Script:
    """The given answers to the first requests, `then` afterwards."""
    waiting, lock = list(answers), threading.Lock()

    def script(request: Request) -> Answer:
        with lock:
            answer = waiting.pop(0) if waiting else None
        return answer or then(request)

    return script


class Board(Protocol):
    """What answers requests to other addresses than that of completions."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None: ...


class JudgeServer:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.board: Board | None = None
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.requests)


@contextmanager
def serve(script: Script) -> Iterator[JudgeServer]:
    judge = JudgeServer(script)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            found = judge.board.answer("GET", self.path, self._sent_headers(), b"") if judge.board else None
            self._send(found or error(404, "Not Found"))

        def _sent_headers(self) -> dict[str, str]:
            return {key.lower(): value for key, value in self.headers.items()}

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            if judge.board and (found := judge.board.answer("POST", self.path, self._sent_headers(), content)):
                self._send(found)
                return
            request = Request(self.path, self._sent_headers(), json.loads(content))
            with judge.lock:
                judge.requests.append(request)
                judge.in_flight += 1
                judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
            try:
                self._send(judge.script(request))
            finally:
                with judge.lock:
                    judge.in_flight -= 1

        def _send(self, answer: Answer) -> None:
            time.sleep(answer.delay)
            if answer.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if answer.cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            for start in range(0, len(content), 1 if answer.drip else max(1, len(content))):
                time.sleep(answer.drip)
                self.wfile.write(content[start : start + (1 if answer.drip else len(content))])
                self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that give up are part of the play

    server = Server(("127.0.0.1", 0), Handler)
    judge.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
