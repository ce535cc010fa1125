"""What requests the page's server answers at all: those that the page itself makes.

Gradio's server has more addresses than the page needs, some of which fetch URLs or start programs; they do not exist
here. A web site that somebody has open beside the page can reach a server on this machine, too: by its origin, or by a
name that it makes point here (DNS rebinding). Both are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

API = "/gradio_api"
UPLOAD, JOIN = f"{API}/upload", f"{API}/queue/join"
ADDRESSES = {"/", "/config", "/theme.css", "/favicon.ico", UPLOAD, JOIN, f"{API}/queue/data", f"{API}/upload_progress",
             f"{API}/startup-events", f"{API}/cancel", f"{API}/reset"}
# A file's address holds its absolute path, which Gradio compares with what this server made or was given.
BELOW = ("/assets/", "/static/", f"{API}/heartbeat/", f"{API}/file=/")
EVENT_BYTES = 10**6  # of a request that is no upload
FORM_BYTES = 10**5  # what a form may add to the file in it


class Guard:
    """ASGI middleware. `hosts` are the names that the server answers to, None for all; uploads are kept in `folder`,
    which may hold `total_bytes`."""

    def __init__(self, app, hosts: Collection[str] | None, upload_bytes: int, folder: Path, total_bytes: int):
        self.app, self.hosts, self.upload_bytes = app, hosts, upload_bytes
        self.folder, self.total_bytes = folder, total_bytes
        self.arriving = 0  # bytes of uploads that are not in the folder yet

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            status, reason = self._refusal(scope, headers)
            if not status and scope["path"] == UPLOAD:
                return await self._upload(scope, int(headers["content-length"]), receive, send)
            if not status and scope["method"] == "POST":
                body = await _body(receive)
                status, reason = (413, "the request is too large") if body is None else _names_url(body)
                receive = _replay(body, receive)
            if status:
                return await _answer(send, status, reason)
        elif scope["type"] != "lifespan":
            return None  # a websocket, which the page does not use
        return await self.app(scope, receive, send)

    def _refusal(self, scope, headers: Mapping[str, str]) -> tuple[int, str]:
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        names = [name for name, _ in scope["headers"]]
        if any(names.count(name) > 1 for name in (b"host", b"origin", b"content-length", b"transfer-encoding")):
            return 400, "the request says twice what may be said once"
        if "content-length" in headers and "transfer-encoding" in headers:
            return 400, "the request tells its length in two ways"
        if self.hosts is not None and _split(f"//{host}", "hostname") not in self.hosts:
            return 403, "this server does not answer to that name"
        if origin is not None and _split(origin, "netloc") != host:
            return 403, "this server does not answer to other web sites"
        if path not in ADDRESSES and not path.startswith(BELOW):
            return 404, "there is nothing here"
        if path == UPLOAD:
            return self._upload_refusal(headers.get("content-length", ""))
        return 0, ""

    def _upload_refusal(self, length: str) -> tuple[int, str]:
        if not re.fullmatch("[0-9]{1,18}", length):
            return 411, "the request does not tell its length"
        if int(length) > self.upload_bytes + FORM_BYTES:
            return 413, f"the file is larger than {self.upload_bytes} bytes"
        if self._kept() + self.arriving + int(length) > self.total_bytes:
            return (
                507,
                f"uploads and pictures of the last hour already take up the {self.total_bytes} bytes that they may",
            )
        return 0, ""

    def _kept(self) -> int:
        total = 0
        for parent, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):  # removed meanwhile
                    total += os.lstat(os.path.join(parent, name)).st_size
        return total

    async def _upload(self, scope, length: int, receive, send) -> None:
        """Pass an upload on, and no more of it than it said."""
        stream = _Bounded(length, receive, send)
        self.arriving += length
        try:
            await self.app(scope, stream.receive, stream.send)
        except Exception:
            if not stream.exceeded:
                raise
        finally:
            self.arriving -= length
        if stream.exceeded and not stream.answered:
            await _answer(send, 413, "the request is longer than it said")


class _Bounded:
    """A request whose client is said to have gone once it sends more than `most` bytes; what is answered then is not
    sent.
    """

    def __init__(self, most: int, receive, send):
        self.left, self._receive, self._send = most, receive, send
        self.exceeded = self.answered = False

    async def receive(self):
        message = await self._receive()
        self.left -= len(message.get("body", b""))
        self.exceeded = self.exceeded or self.left < 0
        return {"type": "http.disconnect"} if self.exceeded else message

    async def send(self, message) -> None:
        if not self.exceeded or self.answered:
            self.answered = True
            await self._send(message)


def _split(address: str, part: str) -> str | None:
    """A part of a URL, None of what is no URL."""
    try:
        return getattr(urlsplit(address), part)
    except ValueError:
        return None


async def _body(receive) -> bytes | None:
    """The whole request's, or None when it is longer than EVENT_BYTES."""
    parts, length, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > EVENT_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes | None, receive):
    """A `receive` that gives the body first, and then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return waiting.pop() if waiting else await receive()

    return again


def _names_url(body: bytes) -> tuple[int, str]:
    """Refuses a file given by its URL, which Gradio would fetch."""
    try:
        waiting = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return 400, "the request is not JSON"
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and not path.startswith("/"):
                return 403, "files are uploaded, not fetched"
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return 0, ""


async def _answer(send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
