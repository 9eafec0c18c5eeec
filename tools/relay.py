"""A stretch of network between a node and its server: it counts bytes, can be cut, and can listen behind the TLS.

Cut, it does what a broken network does: nothing is refused, and nothing arrives. To listen it needs the server's key,
and speaks TLS to both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path

PIECE = 1 << 16


class Relay:
    """Forwards from `port` on the loopback to `target`; with `keys`, the server's folder, `heard` is what both said."""

    def __init__(self, target: int, keys: Path | None = None) -> None:
        self.target = target
        self.keys = keys
        self.heard = bytearray()
        self.up = self.down = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._is_open: asyncio.Event | None = None
        self._stop: asyncio.Event | None = None

    def __enter__(self) -> Relay:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def cut(self) -> None:
        """From now on nothing arrives, in either direction."""
        assert self._is_open is not None
        self._loop.call_soon_threadsafe(self._is_open.clear)

    def restore(self) -> None:
        """What was held back arrives, and what follows."""
        assert self._is_open is not None
        self._loop.call_soon_threadsafe(self._is_open.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._is_open, self._stop = asyncio.Event(), asyncio.Event()
        self._is_open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        inside = outside = None
        if self.keys is not None:
            inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            inside.load_cert_chain(self.keys / "server.crt", self.keys / "server.key")
            outside = ssl.create_default_context(cafile=str(self.keys / "ca.crt"))
        self._outside = outside
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=inside)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        assert self._is_open is not None
        try:
            await self._is_open.wait()
            with contextlib.suppress(OSError, ssl.SSLError):
                await self._join(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = "localhost" if self._outside else None
        far = await asyncio.open_connection("127.0.0.1", self.target, ssl=self._outside, server_hostname=name)
        try:
            await asyncio.gather(self._pump(reader, far[1], is_up=True), self._pump(far[0], writer, is_up=False))
        finally:
            far[1].transport.abort()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_up: bool) -> None:
        assert self._is_open is not None
        while data := await source.read(PIECE):
            await self._is_open.wait()
            self.up += len(data) if is_up else 0
            self.down += 0 if is_up else len(data)
            if self.keys is not None:
                self.heard += data
            target.write(data)
            await target.drain()
        # one side has said all: with HTTP that is the end
        target.close()
