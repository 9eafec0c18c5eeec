"""A model hub on the loopback: it takes commits, and keeps what was asked of it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Requests in order, and the files of every commit; with `refusal` a commit is answered by that status and text."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.files: dict[str, bytes] = {}
        self.refusal: tuple[int, str] | None = None
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/api/repos/create"):
            return 200, {"url": f"{self.url}/me/model", "name": "me/model", "id": "me/model"}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            if self.refusal is not None:
                return self.refusal[0], {"error": self.refusal[1]}
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/me/model/commit/0", "commitOid": "0" * 40, "success": True}
        return 200, {"errors": [], "warnings": []}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = _read_chunks(self.rfile)
            hub.requests.append((self.path, dict(self.headers), body))
            status, value = hub.answer(self.path, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _read_chunks(handle: Any) -> bytes:
    content = b""
    while size := int(handle.readline(), 16):
        content += handle.read(size)
        handle.readline()
    handle.readline()
    return content
