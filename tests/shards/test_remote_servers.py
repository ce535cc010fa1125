"""Servers that send elsewhere, trickle, break off, answer with another part or lie about sizes: named, and tried again
within bounds.
"""

import contextlib
import http.server
import itertools
import time
from functools import partial
from urllib.request import Request

import pytest
from shard_server import FolderServer, copies, only_error
from small_shards import samples

from gigatok_ds.cli.main import main
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.shards.shard_cache import ShardCache
from gigatok_ds.transport import http_client, transports

pytestmark = pytest.mark.usefixtures("remote_settings")

TAR = "demo-000000.tar"


class AnsweringServer(FolderServer):
    """Serves a folder; `answers` has, by name, functions of the handler and the file's bytes that answer instead, one
    after the other, the last for good."""

    def __init__(self, folder):
        self.answers, self.asked = {}, []
        super().__init__(folder, Handler)

    def handle_error(self, *_):
        pass  # a client that has given up


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, request, address, server):
        super().__init__(request, address, server, directory=server.folder)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append((name, self.headers["Range"]))
        answers = self.server.answers.get(name)
        if not answers:
            return super().do_GET()
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        path = self.server.folder / name
        return answer(self, path.read_bytes() if path.is_file() else b"")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(shards):
    with contextlib.closing(AnsweringServer(shards)) as server:
        yield server


def first(server, cache):
    """The first sample, which is in TAR."""
    return open_shards(server.url, cache=cache).read(0)


def good(handler, data):
    handler.answer(200, data, Content_Length=len(data), ETag='"v1"')


def cut(handler, data):
    """Half of it, and the connection breaks."""
    handler.answer(200, data[: len(data) // 2], Content_Length=len(data), ETag='"v1"')


def moved(target, status=302):
    return lambda handler, data: handler.answer(status, b"", Location=target)


def part(said, tag='"v1"', start=0, length=None):
    """An answer of status 206 with a part of its own choice, and what it says of it."""

    def answer(handler, data):
        body = data[start:]
        headers = {"ETag": tag} | ({"Content_Range": said.format(size=len(data), half=len(data) // 2,
                                                                 last=len(data) - 1)} if said else {})
        handler.answer(206, body, Content_Length=len(body) if length is None else length, **headers)

    return answer


# Redirects ---


@pytest.mark.parametrize("name", [TAR, "index.json", "index.npz", ""])
def test_a_redirect_to_another_scheme_is_refused_at_once(name, server, shards, tmp_path):
    (shards / "secret").write_bytes((shards / TAR).read_bytes())
    if name == "":
        (shards / "index.json").unlink()
    for number, target in enumerate((f"file://{shards}/secret", "ftp://127.0.0.1/secret", "data:,secret",
                                     "s3://bucket/secret")):
        server.answers[name], server.asked[:], empty = [moved(target)], [], ShardCache(tmp_path / f"cache-{number}")
        only_error(partial(first, server, empty), server.url, "redirects to", target.partition(":")[0], "not followed")
        assert [asked for asked, _ in server.asked].count(name) == 1 and copies(empty) == []


def test_redirects_within_http_are_followed_and_loops_end(server, cache):
    server.answers[TAR] = [moved(f"{server.url}/{TAR}?again", 307)]
    assert first(server, cache) == next(samples(1)).image_bytes
    server.answers["demo-000001.tar"] = [moved("/demo-000001.tar")]
    only_error(lambda: open_shards(server.url, cache=cache).read(5), "demo-000001.tar cannot be read after 6 "
                                                                     "attempts", "infinite loop")


@pytest.mark.parametrize("target, followed",
                         [("http://host/x.tar", False), ("file:///etc/passwd", False), ("ftp://host/x", False),
                                              ("//host/x", True), ("https://other/x", True), ("/y", True)])
def test_https_does_not_become_http(target, followed):
    request = Request("https://user:geheim@host/x.tar?sig=geheim")

    def redirected():  # to nobody: without a parent the handler asks nobody, and returns
        return http_client._Redirects().http_error_302(request, None, 302, "", {"Location": target})

    if followed:
        assert redirected() is None
    else:
        assert "geheim" not in only_error(redirected, "https://***@host", target)


# Slow ones ---


def trickle(handler, data, before=b""):
    """A byte now and then: no silence is as long as the time-out."""
    handler.wfile.write(before)
    for byte in itertools.chain(data, itertools.repeat(0)):
        handler.wfile.write(bytes([byte]))
        time.sleep(0.03)


@pytest.mark.parametrize("where", ["body", "headers", "chunks"])
def test_a_server_that_trickles_is_given_up_and_tried_again(where, server, cache, monkeypatch, caplog):
    monkeypatch.setattr(http_client, "TIMEOUT", 0.2)

    def slow(handler, data):
        heads = {"body": f"Content-Length: {len(data)}\r\n\r\n", "headers": "X-Long: ",
                 "chunks": "Transfer-Encoding: chunked\r\n\r\nf"}
        trickle(handler, data if where != "chunks" else b"0" * len(data), f"HTTP/1.1 200 OK\r\n{heads[where]}".encode())

    server.answers[TAR] = [slow, slow, good]
    started = time.monotonic()
    assert first(server, cache) == next(samples(1)).image_bytes
    assert caplog.text.count("bytes in 0 s") == 2 and time.monotonic() - started < 10
    server.answers["demo-000001.tar"] = [slow]
    only_error(lambda: open_shards(server.url, cache=cache).read(5), "demo-000001.tar cannot be read after 6 "
                                                                     "attempts", "only")
    assert copies(cache) == [TAR]


def test_a_trickling_server_ends_within_data_patience(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(http_client, "TIMEOUT", 0.1)
    monkeypatch.setattr(transports, "LONGEST", 0.01)
    server.answers["index.json"] = [trickle]
    started = time.monotonic()
    assert main(["train", "demo_tokenizer", "--out", str(tmp_path / "run"), f"data.train={server.url}",
                 "data.patience=0.02", f"data.validation={server.url}", f"data.cache={tmp_path / 'cache'}"]) == 1
    said = capsys.readouterr().err
    assert f"{server.url}/index.json cannot be read after" in said.splitlines()[-1], said
    assert time.monotonic() - started < 20 and not (tmp_path / "run").exists()


def test_a_large_file_that_comes_steadily_is_not_slow(server, cache, monkeypatch):
    """Longer than the time-out in all, with pauses shorter than that."""
    monkeypatch.setattr(http_client, "TIMEOUT", 0.2)

    def steady(handler, data):
        handler.answer(200, b"", Content_Length=len(data))
        for start in range(0, len(data), 2048):
            handler.wfile.write(data[start : start + 2048])
            time.sleep(0.03)

    server.answers[TAR] = [steady]
    assert first(server, cache) == next(samples(1)).image_bytes
    assert [name for name, _ in server.asked].count(TAR) == 1


# Breaking off ---


def chunked(handler, data):
    handler.protocol_version = "HTTP/1.1"
    handler.answer(200, f"{len(data):x}\r\n".encode() + data[:3000], Transfer_Encoding="chunked", Connection="close")


def endless(handler, data):
    """Neither a length nor chunks: only its end says that it has ended."""
    handler.answer(200, data[:3000])


@pytest.mark.parametrize("early", [cut, chunked, endless, lambda handler, data: None,
                                   lambda handler, data: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")])
def test_a_connection_that_closes_early_is_tried_again(early, server, cache, caplog):
    server.answers[TAR] = [early, early, good]
    assert first(server, cache) == next(samples(1)).image_bytes
    assert caplog.text.count(f"{TAR}: attempt ") == 2
    server.answers["demo-000001.tar"] = [early]
    only_error(lambda: open_shards(server.url, cache=cache).read(5), "demo-000001.tar cannot be read after 6 attempts")
    assert copies(cache) == [TAR]


@pytest.mark.parametrize("name", ["index.json", "index.npz"])
def test_small_files_that_are_cut_off_are_no_files(name, server, cache):
    server.answers[name] = [cut, chunked, good]
    assert first(server, cache) == next(samples(1)).image_bytes


# Other parts ---

WRONG = {
    "another place": part("bytes 7-{last}/{size}", start=7),
    "from the start on": part("bytes 0-{last}/{size}"),
    "no word of it": part(None, start=7),
    "no range": part("bytes {half}-x/{size}"),
    "a number without end": part("bytes {half}-" + "9" * 5000 + "/{size}"),
    "another version": part("bytes {half}-{last}/{size}", tag='"v2"'),
    "nothing there": lambda handler, data: handler.answer(416, b""),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_part_that_was_not_asked_for_is_not_taken(kind, server, cache, caplog):
    server.answers[TAR] = [cut, WRONG[kind], good]
    assert first(server, cache) == next(samples(1)).image_bytes
    size = (server.folder / TAR).stat().st_size
    assert [asked for name, asked in server.asked if name == TAR] == [None, f"bytes={size // 2}-", None]
    assert "answered with" in caplog.text or "has nothing from byte" in caplog.text


def test_parts_without_having_asked_are_named_and_bounded(server, cache):
    server.answers[TAR] = [part("bytes 7-{last}/{size}", start=7)]
    text = only_error(lambda: first(server, cache), f"{server.url}/{TAR} cannot be read after 6 attempts", "'bytes 7-")
    assert "geheim" not in text and copies(cache) == []


def test_a_shorter_part_than_there_is_goes_on_from_its_end(server, cache):
    size = (server.folder / TAR).stat().st_size
    half, quarter = size // 2, size // 4

    def short(handler, data):
        handler.answer(206, data[half : half + quarter], Content_Length=quarter, ETag='"v1"',
                       Content_Range=f"bytes {half}-{half + quarter - 1}/{size}")

    server.answers[TAR] = [cut, short, part("bytes " + str(half + quarter) + "-{last}/*", start=half + quarter)]
    assert first(server, cache) == next(samples(1)).image_bytes
    assert [asked for name, asked in server.asked if name == TAR] == [None, f"bytes={half}-",
                                                                      f"bytes={half + quarter}-"]


# Sizes that are not true ---


def announced(length):
    return lambda handler, data: handler.answer(200, data, Content_Length=length, ETag='"v1"')


def test_more_announced_than_sent_is_tried_again_from_the_start(server, cache, caplog):
    size = (server.folder / TAR).stat().st_size
    server.answers[TAR] = [announced(size + 100), lambda handler, data: handler.answer(416, b""), good]
    assert first(server, cache) == next(samples(1)).image_bytes
    assert f"cut off after {size} of {size + 100} bytes" in caplog.text
    server.answers["demo-000001.tar"] = [announced(10**17)]
    only_error(lambda: open_shards(server.url, cache=cache).read(5), "demo-000001.tar cannot be read after 6 "
                                                                     "attempts", "cut off")


def raising(error):
    def again():
        raise error

    return again


@pytest.mark.parametrize("length", ["3000", "-7", "1e3", "9" * 5000])
def test_lengths_that_are_none_or_too_small_give_no_wrong_copy(length, server, cache):
    server.answers[TAR] = [announced(length)]
    try:
        assert first(server, cache) == next(samples(1)).image_bytes
    except Exception as error:
        message = str(error)
        only_error(raising(error), TAR)
        assert "cannot be read" in message or "has changed since it was indexed: 3000 bytes" in message
        assert copies(cache) == []


def test_what_never_ends_is_left_after_what_was_indexed(server, cache):
    sent = []

    def without_end(handler, data):
        handler.answer(200, data)
        while True:
            handler.wfile.write(bytes(2**20))
            sent.append(2**20)

    server.answers[TAR] = [without_end]
    only_error(lambda: first(server, cache), f"{TAR} has changed since it was indexed: more than")
    assert sum(sent) < 2**27 and copies(cache) == []


def test_small_files_and_listings_are_bounded(server, shards, cache, monkeypatch):
    monkeypatch.setattr("gigatok_ds.shards.remote.RemoteTars.read.__defaults__", (None, 100))
    only_error(lambda: first(server, cache), f"{server.url}/index.json has more than the 100 bytes")
    (shards / "index.json").unlink()
    monkeypatch.setattr(transports, "LISTING_BYTES", 100)
    only_error(lambda: first(server, ShardCache(cache.root.with_name("other"))),
               f"{server.url} has more than the 100 bytes")
