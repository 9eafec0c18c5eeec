"""The Batch API of the loopback judge: files, batches that wait until a test finishes them, and faults on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from judge_server import Answer, Request, Script, error

BATCH_KEY = re.compile(r'name="purpose"\r\n\r\n(\w+)\r\n')
_CONTENT = re.compile(rb'filename="[^"]*"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n--', re.DOTALL)


class BatchBoard:
    """`created` has every batch in order of creation, `asked` every request that a batch worked on: those are paid."""

    def __init__(self, *, page: int = 100) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.asked: list[Request] = []
        self.calls: list[str] = []
        self.page = page
        self.before: list[Answer] = []
        """Answers to the next requests that create a batch, which then create none."""
        self.after: list[Answer] = []
        """Answers in place of the next batches that are created."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        place = urlsplit(path)
        name = place.path.removeprefix("/v1/")
        if not name.startswith(("files", "batches")):
            return None
        self.calls.append(f"{method} {name.split('/')[0]}")
        if method == "POST" and name == "files":
            assert BATCH_KEY.findall(body.decode()) == ["batch"]
            (content,) = _CONTENT.findall(body)
            return Answer(body={"id": self._keep(content), "object": "file", "purpose": "batch"})
        if method == "POST":
            return self._create(json.loads(body))
        if name == "batches":
            return self._list(parse_qs(place.query))
        if name.startswith("batches/"):
            return Answer(body=next(one for one in self.created if one["id"] == name.removeprefix("batches/")))
        return Answer(body=self.files[name.split("/")[1]])

    def _create(self, asked: dict[str, Any]) -> Answer:
        if self.before:
            return self.before.pop(0)
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        batch = {
            "id": f"batch_{len(self.created)}",
            "object": "batch",
            "status": "in_progress",
            "input_file_id": asked["input_file_id"],
            "created_at": 2_000_000_000 + len(self.created),
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": len(self.lines_of(asked["input_file_id"])), "completed": 0, "failed": 0},
        }
        self.created.append(batch)
        return self.after.pop(0) if self.after else Answer(body=batch)

    def _list(self, query: dict[str, list[str]]) -> Answer:
        newest = self.created[::-1]
        if after := query.get("after"):
            newest = newest[[one["id"] for one in newest].index(after[0]) + 1 :]
        size = min(self.page, int(query["limit"][0]))
        return Answer(body={"object": "list", "data": newest[:size], "has_more": len(newest) > size})

    def _keep(self, content: bytes) -> str:
        name = f"file_{len(self.files)}"
        self.files[name] = content
        return name

    def lines_of(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[file].splitlines()]

    @property
    def sent(self) -> list[Request]:
        """The requests of every batch that was created."""
        return [
            Request(line["url"], {}, line["body"])
            for one in self.created
            for line in self.lines_of(one["input_file_id"])
        ]

    def finish(
        self, script: Script, *, status: str = "completed", works_on: Callable[[int], bool] = lambda number: True
    ) -> None:
        """End every batch that is in progress: the script answers the requests that it `works_on`, by number."""
        for batch in self.created:
            if batch["status"] != "in_progress":
                continue
            output, errors = [], []
            for number, line in enumerate(self.lines_of(batch["input_file_id"])):
                if not works_on(number):
                    expired = {"code": "batch_expired", "message": "This request could not be executed in time."}
                    errors.append({"custom_id": line["custom_id"], "response": None, "error": expired})
                    continue
                self.asked.append(Request(line["url"], {}, line["body"]))
                answer = script(self.asked[-1])
                response = {"status_code": answer.status, "request_id": "r", "body": answer.body}
                kept = output if answer.status == 200 else errors
                kept.append(
                    {"id": f"batch_req_{number}", "custom_id": line["custom_id"], "response": response, "error": None}
                )
            batch |= {"status": status}
            for name, lines in (("output_file_id", output), ("error_file_id", errors)):
                if lines:
                    # in another order than they were sent
                    batch[name] = self._keep("".join(json.dumps(one) + "\n" for one in lines[::-1]).encode())

    def fail(self, message: str) -> None:
        """The endpoint refuses the files of every batch in progress."""
        for batch in self.created:
            if batch["status"] == "in_progress":
                data = [{"code": "invalid", "message": message, "line": 1}]
                batch |= {"status": "failed", "errors": {"object": "list", "data": data}}


class NoBatches:
    """An endpoint that answers everything about batches with one status."""

    def __init__(self, status: int) -> None:
        self.status = status

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        return None if path.endswith("/chat/completions") else error(self.status, "no such thing")
