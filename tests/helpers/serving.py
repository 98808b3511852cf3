"""A server process of a test, and the requests that tests send to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

_PATIENCE = 120.0  # seconds, for a machine that does much else


@dataclass(frozen=True)
class Reply:
    """A reply: its status, headers and body."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after a look at the form that every error must have."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.status >= 400
        return error

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; the last one is [DONE] or an error."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class Served:
    """A server process on a free port of this machine.

    Args:
        bundles: Directories of the bundles.
        options: More of the command line.
    """

    def __init__(self, bundles: Sequence[Path], *options: str, key: str | None = None) -> None:
        command = [sys.executable, "-m", "visprune", "serve", *map(str, bundles), "--port", "0", *options]
        self.key = key
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.address = self.line("page: ").split()[1].rstrip("/")
        self.port = int(self.address.rpartition(":")[2])

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        self.process.wait()
        with self._changed:
            self._changed.notify_all()

    def line(self, text: str, after: int = 0) -> str:
        """Wait for a line of the server's messages that holds a text."""
        with self._changed:
            found: list[str] = []

            def seen() -> bool:
                found[:] = [line for line in self.lines[after:] if text in line]
                return bool(found) or self.process.poll() is not None

            assert self._changed.wait_for(seen, _PATIENCE), f"no {text!r} in {self.lines}"
            assert found, f"the server ended: {self.lines}"
            return found[0]

    def ready(self) -> Served:
        self.line("Ready.")
        return self

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request in a connection of its own. A body that is no bytes is sent as JSON."""
        sent = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            connection.request(method, path, body, sent | (headers or {}))
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def chat(self, content: Any = "What is the letter?", **fields: Any) -> Reply:
        """Ask one question of the only model. A field that is None is left out."""
        request = {
            "model": self.models()[0],
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            **fields,
        }
        return self.request(
            "POST", "/v1/chat/completions", {k: v for k, v in request.items() if v is not None}
        )

    def models(self) -> list[str]:
        return [model["id"] for model in self.get("/v1/models").json["data"]]

    def metric(self, name: str) -> float:
        """Return the value of a figure, with its labels as Prometheus writes them."""
        lines = self.get("/metrics").body.decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    @contextmanager
    def raw(self) -> Iterator[socket.socket]:
        """Yield a connection, for what no client sends."""
        with socket.create_connection(("127.0.0.1", self.port), _PATIENCE) as connection:
            yield connection

    def send(self, *parts: bytes) -> bytes:
        """Send bytes as they are, and return all that comes back until the server closes."""
        with self.raw() as connection:
            for part in parts:
                connection.sendall(part)
            return received(connection)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_PATIENCE)


@contextmanager
def serving(bundles: Sequence[Path], *options: str, key: str | None = None) -> Iterator[Served]:
    """Start a server, and kill it at the end."""
    served = Served(bundles, *options, key=key)
    try:
        yield served.ready()
    finally:
        served.process.kill()
        served.process.wait()


def received(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """Return an image as a data: URL."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_part(url: str) -> dict[str, Any]:
    """Return a picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": text}
