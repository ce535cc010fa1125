"""A server of shards that fails as told, and what is left of what it has sent."""

import http.server
import threading
import time

import pytest

from gigatok_ds.errors import InputError, MachineError


class FolderServer(http.server.ThreadingHTTPServer):
    """Serves a folder at `url`, by a handler of the caller's, until it is closed."""

    daemon_threads = True

    def __init__(self, folder, handler):
        self.folder = folder
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def close(self):
        self.shutdown()
        self.server_close()


class Server(FolderServer):
    """Serves `folder`, remembers what was asked for, and fails as `failures` says: for a name, the statuses to come.

    The status "cut" breaks the connection in the middle, "slow" sends half and then nothing more.
    """

    def __init__(self, folder):
        self.requests, self.failures = [], {}
        self.ranges, self.starts = None, []  # whether parts are served (None: nothing is said of them), and from where
        super().__init__(folder, Handler)

    def fetched(self):
        return sorted(name for method, name in self.requests if method == "GET" and name.endswith(".tar"))


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, request, address, server):
        super().__init__(request, address, server, directory=server.folder)

    def do_GET(self):
        name = self.path.rpartition("/")[2].partition("?")[0]
        self.server.requests.append(("GET", name))
        left = self.server.failures.get(name, [])
        failure = left.pop(0) if left else None
        if isinstance(failure, int):
            self.send_error(failure)
        elif failure == "busy":
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.end_headers()
        elif failure or (name.endswith(".tar") and self.server.ranges is not None):
            self.send_part(name, failure)
        else:
            super().do_GET()

    def send_part(self, name, failure):
        """All of a tar, or half of it, or from a place on if that is asked for and it has not changed."""
        path = self.server.folder / name
        data, tag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
        asked = self.headers["Range"] if self.server.ranges and self.headers["If-Range"] == tag else None
        start = int(asked[6:-1]) if asked else 0
        self.server.starts.append(start)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.server.ranges is not None:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(data[start : len(data) // 2 if failure else None])
        self.wfile.flush()
        time.sleep(60 if failure == "slow" else 0)

    def do_HEAD(self):
        self.server.requests.append(("HEAD", self.path.rpartition("/")[2]))
        super().do_HEAD()

    def log_message(self, *_):
        pass


def copies(cache):
    return sorted(path.name for path in cache.root.glob("*/*.tar"))


def only_error(function, *words):
    """The one line, with these words, of an error that the user has to mend, or of one that may pass: after attempts.
    """
    with pytest.raises((InputError, MachineError)) as caught:
        function()
    text = str(caught.value)
    assert isinstance(caught.value, MachineError) == ("attempts (" in text)
    assert "\n" not in text and all(word in text for word in words), text
    return text
