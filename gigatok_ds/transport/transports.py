"""Reading files that lie elsewhere: over HTTP, through fsspec, or from the output of a command."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from http.client import InvalidURL
from typing import BinaryIO, NamedTuple, Protocol, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from gigatok_ds.config.location import masked
from gigatok_ds.errors import InputError, MachineError
from gigatok_ds.file_kinds import is_tar
from gigatok_ds.transport.http_client import OtherPart, open_url, part_of

ATTEMPTS = 6  # at least
BACKOFF, LONGEST = 1.0, 60.0  # seconds, at most, before the second attempt; the next waits are up to twice as long each
LISTING_BYTES = 256 * 1024**2

_REFUSALS = set(range(400, 500)) - {408, 425, 429}  # HTTP statuses that will not be others a little later
_MISTAKES = (TypeError, AttributeError, NameError, AssertionError)  # of programs, not of networks

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Missing(InputError):
    """There is no such file or directory."""


class Unreachable(MachineError):
    """All attempts have failed, which may be otherwise later."""


class Opened(NamedTuple):
    """A file, from byte `start` on; how many bytes it has in all, and what identifies this content of it, if known.

    `delimited` says whether its end can be told from a connection that broke.
    """

    stream: BinaryIO
    size: int | None = None
    start: int = 0
    tag: str | None = None
    delimited: bool = True


class Transport(Protocol):
    """One attempt each; what may raise anything is to be called through `persistently`."""

    def tars(self, directory: str) -> dict[str, int | None]:
        """File names and, if the listing tells them, sizes of the tars in a directory."""

    def size(self, url: str) -> int | None:
        """Bytes of a file, None if they cannot be known beforehand."""

    def open(self, url: str, start: int = 0, tag: str | None = None) -> AbstractContextManager[Opened]:
        """A file, from `start` on if it still has this tag and that can be had. What went wrong may be raised at the
        end.
        """


def transport_of(location: str) -> Transport:
    """How to read a location."""
    if location.startswith("pipe:"):
        return Pipe()
    return Http() if location.startswith(("http://", "https://")) else Fsspec()


def persistently(action: Callable[[], T], name: str, *, patience: float, attempts: int | None = None) -> T:
    """The result of `action`, which is repeated when it fails for a reason that may pass.

    That is `attempts` times or, without, for `patience` seconds (and ATTEMPTS times at least). Between attempts it
    waits, longer each time, and at random, so that many processes do not come back all at once, or as long as a server
    asks for. Raises Unreachable, naming the file `name`, and InputError where it is refused (Missing, if there is
    none).
    """
    name = masked(name)
    chance = random.Random()  # nobody else's random numbers
    until = time.monotonic() + patience
    for attempt in itertools.count(1):
        try:
            return action()
        except (InputError, *_MISTAKES):
            raise
        except Exception as error:  # the packages behind fsspec have exceptions of their own
            if refusal := _refusal(name, error):
                raise refusal from None
            left = until - time.monotonic()
            if attempt >= (attempts or ATTEMPTS) and (attempts or left <= 0):
                raise Unreachable(f"{name} cannot be read after {attempt} attempts ({_said(error)}); check "
                                  "location and network, and run the same command again") from None
            wait = min(BACKOFF * 2 ** (attempt - 1), LONGEST) * chance.uniform(0.5, 1)
            wait = max(wait, min(_asked_wait(error), max(left, 0)))
            logger.warning("%s: attempt %d failed (%s); the next one in %.1f s", name, attempt, _said(error), wait)
        time.sleep(wait)
    raise AssertionError("itertools.count ended")


def _asked_wait(error: Exception) -> float:
    """Seconds that a server asks for by Retry-After, 0 if it does not."""
    said = (error.headers.get("Retry-After") or "").strip() if isinstance(error, HTTPError) and error.headers else ""
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _refusal(name: str, error: Exception) -> InputError | None:
    """What to tell the user where another attempt would fail as well."""
    status = error.code if isinstance(error, HTTPError) else None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Missing(f"{name} does not exist; check the location")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return InputError(f"{name} may not be read ({_said(error)}); check the location and your credentials")
    if isinstance(error, (ValueError, InvalidURL)) or status in _REFUSALS:
        return InputError(f"{name} cannot be read ({_said(error)}); check the location")
    return None


def _said(error: Exception) -> str:
    return masked(" ".join(str(error).split())) or type(error).__name__


def read_all(opened: Opened, name: str, most: int) -> bytes:
    """All of a small file. Raises OSError when it is cut off, and InputError when it has more than `most` bytes."""
    if (opened.size or 0) > most or len(data := opened.stream.read(most + 1)) > most:
        raise InputError(f"{masked(name)} has more than the {most:,} bytes that such a file may have; check the "
                         "location")
    check_end(len(data), opened.size)
    return data


def check_end(got: int, size: int | None) -> None:
    """Raise OSError when so many bytes are not as many as were announced."""
    if size is not None and got != size:
        raise OSError(f"cut off after {got} of {size} bytes" if got < size
                      else f"more than the {size} bytes that were announced")


class Http:
    """http and https, by `transport.http_client`."""

    def tars(self, directory: str) -> dict[str, int | None]:
        with open_url(beside(directory, "")) as response:
            links = _Links(response.url)
            links.feed(read_all(Opened(response, response.length), directory, LISTING_BYTES).decode("utf-8", "replace"))
        return dict.fromkeys(links.tars)

    def size(self, url: str) -> int | None:
        try:
            with open_url(url, "HEAD") as response:
                length = response.headers["Content-Length"] or ""
        except HTTPError as error:
            # A server without HEAD, or a URL signed for GET: that will tell.
            if error.code in (400, 401, 403, 405, 501):
                return None
            raise
        return int(length) if length.isdecimal() and len(length) < 19 else None

    @contextmanager
    def open(self, url: str, start: int = 0, tag: str | None = None) -> Iterator[Opened]:
        part = {"Range": f"bytes={start}-", "If-Range": tag} if start and tag else {}
        try:
            response = open_url(url, headers=part)
        except HTTPError as error:
            if error.code == 416 and part:
                raise OtherPart(f"the server has nothing from byte {start} on") from None
            raise
        with response:
            etag, changed = response.headers["ETag"], response.headers["Last-Modified"]
            now = etag if etag and not etag.startswith("W/") else changed
            if response.status == 206:
                size = part_of(response, start if part else 0)
                if part and now not in (None, tag):
                    raise OtherPart(f"the server answered with a part of {now[:60]!r}, not of {tag!r}")
                yield Opened(response, size, start if part else 0, tag if part else now)
            else:
                yield Opened(response, response.length, 0, now,
                             delimited=response.length is not None or response.chunked)


class _Links(HTMLParser):
    """The tars of the same directory that a page of HTML links to."""

    def __init__(self, page: str):
        super().__init__()
        self.page = page
        self.tars: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        target = urljoin(self.page, dict(attributes).get("href") or "") if tag == "a" else ""
        page, link = urlsplit(self.page), urlsplit(target)
        folder, _, name = link.path.rpartition("/")
        name = unquote(name)
        beside_it = (*link[:2], folder) == (*page[:2], page.path.rpartition("/")[0])
        if beside_it and is_tar(name) and "/" not in name:
            self.tars.append(name)


class Fsspec:
    """Whatever fsspec has a package for. Opened anew for each use, since connections do not outlive a fork."""

    def tars(self, directory: str) -> dict[str, int | None]:
        system, path = _file_system(directory)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in system.ls(path, detail=True)
                if entry["type"] == "file" and is_tar(entry["name"].rpartition("/")[2])}

    def size(self, url: str) -> int | None:
        system, path = _file_system(url)
        return system.size(path)

    @contextmanager
    def open(self, url: str, start: int = 0, tag: str | None = None) -> Iterator[Opened]:
        system, path = _file_system(url)
        now = system.ukey(path)
        with system.open(path, "rb") as file:
            start = file.seek(start) if start and tag == now else 0
            yield Opened(file, getattr(file, "size", None), start, now)


def _file_system(url: str):
    """fsspec's file system of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError:
        raise InputError(f"reading {masked(url)} needs fsspec; pip install fsspec") from None
    try:
        return url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0] if scheme in known_implementations else ""
        hint = f"pip install {package}" if package not in ("", "fsspec") else _said(error)
        raise InputError(f"reading {masked(url)} needs a package that is not installed; {hint}") from None
    except ValueError as error:
        raise InputError(
            f"{masked(url)} cannot be opened ({_said(error)}); give a directory, or a URL with a scheme that "
            "fsspec knows, such as s3://, gs:// or https://"
        ) from None


class Pipe:
    """The output of a command of the shell, through webdataset."""

    def tars(self, directory: str) -> dict[str, int | None]:
        raise InputError(f"{masked(directory)} does not name a tar; give a command that writes one to its output")

    def size(self, url: str) -> int | None:
        return None

    @contextmanager
    def open(self, url: str, start: int = 0, tag: str | None = None) -> Iterator[Opened]:
        from webdataset import gopen

        with gopen(url) as stream:
            stream.ignore_errors = True  # of its status, until the output is read
            yield Opened(stream)
        if stream.status in (126, 127):
            raise InputError(f"{masked(url)}: the command cannot be run (exit code {stream.status})")
        if stream.status:
            raise OSError(f"the command failed with exit code {stream.status}")


def beside(directory: str, name: str) -> str:
    """The URL of a file in a directory, which may have a query."""
    scheme, host, path, query, _ = urlsplit(directory)
    if scheme in ("http", "https"):
        return urlunsplit((scheme, host, f"{path.rstrip('/')}/{quote(name)}", query, ""))
    return f"{directory.rstrip('/')}/{name}"
