"""Serving the page: where, to whom, with which files, until when."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from gigatok_ds.app.guard import Guard
from gigatok_ds.app.models import Models
from gigatok_ds.app.page import build_page
from gigatok_ds.app.uploads import Limits
from gigatok_ds.errors import InputError
from gigatok_ds.signals import handled

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SESSIONS = 64  # whose images' codes are kept


@contextlib.contextmanager
def served(models: Models, limits: Limits, *, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page as long as the context lasts; its address. Uploads lie in a private directory, removed at the end.

    Raises InputError when Gradio is not installed or nothing can listen there.
    """
    _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="gigatok-ds.app.") as folder, _environment(_settings(folder)):
        try:  # in this environment: Gradio makes directories when it is imported
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError as error:
            raise InputError(f"the page needs what cannot be imported ({error}); pip install "
                             "'gigatok_ds[app]'") from error
        page = build_page(models, limits)
        guard = Middleware(Guard, hosts=LOOPBACK if host in LOOPBACK else None, upload_bytes=limits.bytes,
                           folder=Path(folder), total_bytes=limits.total_bytes)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # local
        try:
            _, address, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host, server_port=port, prevent_thread_lock=True,
                quiet=True, inbrowser=False, share=False, allowed_paths=[], max_file_size=limits.bytes, footer_links=[],
                run_history=False, ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
                state_session_capacity=SESSIONS, theme=theme, app_kwargs={"middleware": [guard]})
            yield address
        finally:
            page.close(verbose=False)


def serve(models: Models, limits: Limits, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises what `served` raises."""
    ended = threading.Event()
    with (handled(lambda *_: ended.set(), signal.SIGINT, signal.SIGTERM),
          served(models, limits, host=host, port=port) as address):
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        if host not in LOOPBACK:
            logger.warning("whoever reaches %s can use it: there is no password and no encryption", host)
        ended.wait()


def _check_free(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; it must be from 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise InputError(
            f"nothing can listen at {host}, port {port} ({error}); choose another --host or --port"
        ) from None


def _settings(folder: str) -> Mapping[str, str]:
    """What Gradio reads from the environment: files in `folder` only, and no calls to anywhere."""
    return {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": os.path.join(folder, "examples"),
            "GRADIO_ALLOWED_PATHS": "", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1",
            "no_proxy": "*"}  # it asks its own server whether it runs


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
