"""Opening URLs of http and https: redirects do not leave them, and a server that sends next to nothing counts as
silent.
"""

from __future__ import annotations

import functools
import http.client
import io
import re
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from gigatok_ds.config.location import masked
from gigatok_ds.errors import InputError

TIMEOUT = 60.0  # seconds without a byte after which a connection counts as broken
SLOWEST = 1000  # bytes a second; fewer, over TIMEOUT seconds of waiting, and it counts as broken, too

_FOLLOWED = {"http": ("http", "https"), "https": ("https",)}  # schemes that a redirect may lead to
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class OtherPart(OSError):
    """A server has sent another part of a file than it was asked for."""


def open_url(url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """The response to a request, by Python's own client, which works in forked processes and heeds the usual proxy
    variables.

    Raises HTTPError for a status that is no success, InputError for a redirect to another scheme (from http to https is
    allowed), and whatever connections raise, here and when the response is read.
    """
    request = Request(url, headers={"User-Agent": "gigatok-ds", **(headers or {})}, method=method)
    return _opener().open(request, timeout=TIMEOUT)


def part_of(response: http.client.HTTPResponse, start: int) -> int:
    """How many bytes a file has in all, of which a response of status 206 is the part from `start` on. Raises OtherPart
    if it is not.
    """
    said = response.headers["Content-Range"] or "no Content-Range"
    found = _CONTENT_RANGE.fullmatch(said)
    if not found or int(found[1]) != start or int(found[2]) < start:
        raise OtherPart(f"the server answered with {said[:60]!r}, not with the file from byte {start} on")
    return int(found[2]) + 1 if found[3] == "*" else int(found[3])


class _Redirects(HTTPRedirectHandler):
    def http_error_302(self, req, fp, code, msg, headers):
        target = urljoin(req.full_url, headers.get("Location") or "")
        if urlsplit(target).scheme not in _FOLLOWED[req.type]:
            raise InputError(f"{masked(req.full_url)} redirects to {masked(target)}, which is not followed: from http "
                             "only http and https are, from https only https; check the location, or give that one if "
                             "you trust it")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Paced(io.RawIOBase):
    """What comes from a connection. Raises TimeoutError when it comes more slowly than SLOWEST; only waiting counts."""

    def __init__(self, raw: io.RawIOBase):
        self._raw, self._waited, self._got = raw, 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        began = time.monotonic()
        count = self._raw.readinto(buffer)
        self._waited += time.monotonic() - began
        self._got += count or 0
        if self._waited > TIMEOUT and count:
            if self._got < SLOWEST * self._waited:
                raise TimeoutError(f"only {self._got} bytes in {self._waited:.0f} s")
            self._waited, self._got = 0.0, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(HTTPHandler):
    def http_open(self, req):
        return self.do_open(_Connection, req)


class _Https(HTTPSHandler):
    _context: ssl.SSLContext | None  # HTTPSHandler's own

    def https_open(self, req):
        return self.do_open(_SecureConnection, req, context=self._context)


@functools.cache
def _opener() -> OpenerDirector:
    """What urllib's own opener is, but for files, FTP and data in the URL itself."""
    opener = OpenerDirector()
    for handler in (ProxyHandler(), UnknownHandler(), HTTPDefaultErrorHandler(), _Redirects(), HTTPErrorProcessor(),
                    _Http(), _Https()):
        opener.add_handler(handler)
    return opener
