"""The page of trained models: its pictures against the models, its uploads, its server over HTTP, and it in a browser.
"""

import io
import json
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import save_models
from small_models import small_gpt, small_gpt_config, small_tokenizer

from gigatok_ds.app import page as page_module
from gigatok_ds.app import uploads, views
from gigatok_ds.app.guard import UPLOAD, Guard
from gigatok_ds.app.models import Models, find_models, open_models
from gigatok_ds.app.page import WAITING, Actions
from gigatok_ds.app.server import served
from gigatok_ds.app.uploads import Limits, read_upload
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.model import QuantizerConfig
from gigatok_ds.data.transforms import center_crop, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.models.gpt import GPT

LIMITS = Limits(megabytes=0.5, megapixels=50)


def spread_tokenizer(**changes):
    """A small tokenizer whose codes differ from image to image and from place to place."""
    tokenizer = small_tokenizer(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tokenizer.quantizer.embedding.normal_(generator=generator)
        for parameter in tokenizer.parameters():
            if parameter.ndim > 1 and parameter is not tokenizer.quantizer.embedding:
                parameter.mul_(4)
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("export"), tokenizer=spread_tokenizer(), gpt=small_gpt())


@pytest.fixture(scope="module")
def models(checkpoints):
    return open_models([checkpoints])


def photo(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of one bit a pixel, all black: a few kilobytes."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


# Pictures


def test_an_image_is_encoded_and_decoded_as_the_model_does(models):
    image = views.encoded(models.tokenizer, photo(0))
    pixels = to_tensor(center_crop(photo(0), 16))[None]
    codes = models.tokenizer.encode(pixels)
    restored = to_uint8(models.tokenizer.decode(codes))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(image.picture, to_uint8(pixels)[0].permute(1, 2, 0).numpy())
    assert image.codes.tolist() == codes[0].tolist()
    assert np.array_equal(image.reconstruction, restored)
    mse = np.mean((image.picture / 255 - restored / 255) ** 2)
    assert image.psnr == pytest.approx(-10 * np.log10(mse), abs=1e-4)


def test_all_codes_are_the_reconstruction_and_none_the_neutral_image(models):
    image = views.encoded(models.tokenizer, photo(0))
    assert (image.codes != models.neutral).all()
    grey = views.encoded(models.tokenizer, Image.new("RGB", (16, 16), (128, 128, 128)))
    for count, codes, picture in ((8, image.codes, image.reconstruction), (0, grey.codes, grey.reconstruction)):
        kept = views.keep_first(image.codes, count, models.neutral)
        assert np.array_equal(kept, codes)
        assert np.array_equal(views.decoded(models.tokenizer, kept), picture)
    kept = views.keep_first(image.codes, 3, models.neutral)
    assert kept.tolist() == [*image.codes[:3], *models.neutral[3:]]
    assert not np.array_equal(views.decoded(models.tokenizer, kept), image.reconstruction)


def test_exchanging_all_codes_exchanges_the_reconstructions(models):
    one, other = (views.encoded(models.tokenizer, photo(seed)) for seed in (0, 1))
    assert not np.array_equal(one.codes, other.codes)
    ours, theirs = views.swapped(one.codes, other.codes, 0, 8)
    assert np.array_equal(views.decoded(models.tokenizer, ours), other.reconstruction)
    assert np.array_equal(views.decoded(models.tokenizer, theirs), one.reconstruction)
    ours, theirs = views.swapped(one.codes, other.codes, 2, 5)
    assert ours.tolist() == [*one.codes[:2], *other.codes[2:5], *one.codes[5:]]
    assert theirs.tolist() == [*other.codes[:2], *one.codes[2:5], *other.codes[5:]]
    assert np.array_equal(views.swapped(one.codes, other.codes, 4, 4)[0], one.codes)


def test_positions_outside_the_codes_are_refused(models):
    codes = np.arange(8)
    for count in (-1, 9):
        with pytest.raises(InputError, match="from 0 to 8"):
            views.keep_first(codes, count, codes)
    for first, last in ((-1, 3), (5, 3), (0, 9)):
        with pytest.raises(InputError, match=r"choose a beginning|from 0 to 8"):
            views.swapped(codes, codes, first, last)


def test_a_difference_is_black_where_nothing_differs():
    picture = np.full((2, 2, 3), 100, dtype=np.uint8)
    other = picture.copy()
    other[0, 0], other[1, 1] = (90, 100, 110), (0, 255, 100)
    found = views.difference(picture, other)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[40, 0, 40], [0, 0, 0]], [[0, 0, 0], [255, 255, 0]]]


def test_close_codes_have_close_colours():
    tokenizer = small_tokenizer(quantizer=QuantizerConfig(codebook_size=64, codebook_dim=4, l2_normalized=False))
    along = torch.linspace(-3, 5, 64)
    with torch.no_grad():
        tokenizer.quantizer.embedding.copy_(along[:, None] * torch.tensor([0.5, -2.0, 0.1, 0.3]))
    first = views.code_colours(tokenizer)[:, 0].astype(int)
    assert (np.diff(first) <= 0).all() or (np.diff(first) >= 0).all()
    assert {first.min(), first.max()} == {30, 240}


def test_a_strip_shows_codes_in_their_order():
    colours = np.arange(64 * 3, dtype=np.uint8).reshape(64, 3)
    codes = np.arange(40) + 5
    strip = views.strip(codes, colours)
    assert strip.shape == (2 * 21 - 1, 32 * 21 - 1, 3)
    assert (strip[0, 31 * 21 + 19] == colours[36]).all() and (strip[21 + 19, 7 * 21] == colours[44]).all()
    assert (strip[30, 8 * 21 :] == 255).all() and (strip[0, 20] == 255).all()  # beyond the last code, between two
    assert views.strip(codes[:8], colours).shape == (20, 8 * 21 - 1, 3)


def test_samples_are_those_of_the_command(models, checkpoints, tmp_path):
    grid = views.samples(models.gpt, models.tokenizer, [4, 1], per_class=3, guidance=2.0, temperature=0.9, top_k=20,
                         seed=7)
    command = ["sample", "--gpt", checkpoints / "gpt", "--tokenizer", checkpoints / "tokenizer", "--classes", "4,1",
               "--per-class", 3, "--cfg", 2, "--temperature", 0.9, "--top-k", 20, "--seed", 7, "--out",
               tmp_path / "grid.png"]
    assert main([str(word) for word in command]) == 0
    assert np.array_equal(grid, np.asarray(Image.open(tmp_path / "grid.png")))


@pytest.mark.parametrize(("change", "said"), [
    ({"classes": []}, "choose at least one"), ({"classes": [5]}, "from 0 to 4"), ({"classes": [-1]}, "from 0 to 4"),
    ({"per_class": 65}, "from 1 to 64"), ({"per_class": 0}, "from 1 to 64"), ({"guidance": 0.5}, "guidance is 0.5"),
    ({"guidance": float("nan")}, "guidance is nan"), ({"temperature": -1}, "temperature is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2.5}, "whole number"), ({"seed": None}, "whole number"), ({"top_k": -1}, "top_k is -1"),
    ({"guidance": None}, "guidance is not set"),
])
def test_settings_out_of_range_are_refused(models, change, said):
    settings = {"classes": [0], "per_class": 1, "guidance": 2.0, "temperature": 1.0, "top_k": 0, "seed": 0}
    with pytest.raises(InputError, match=said):
        Actions(models, LIMITS).sample(**settings | change)


# Models


def test_models_are_found_by_what_they_are(checkpoints, tmp_path):
    both = {"tokenizer": checkpoints / "tokenizer", "gpt": checkpoints / "gpt"}
    assert find_models([checkpoints]) == both == find_models([checkpoints / "gpt", checkpoints / "tokenizer"])
    assert find_models([checkpoints / "tokenizer"]) == {"tokenizer": checkpoints / "tokenizer"}
    shutil.copytree(checkpoints / "gpt", tmp_path / "gpt")
    with pytest.raises(InputError, match=r"two gpts, .* name the directories"):
        find_models([checkpoints, tmp_path / "gpt"])
    with pytest.raises(InputError, match="there is no tokenizer in"):
        find_models([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds none"):
        find_models([tmp_path / "empty"])
    with pytest.raises(InputError, match="is not a directory"):
        find_models([tmp_path / "absent"])


def test_a_gpt_of_other_codes_is_refused(checkpoints, tmp_path):
    config = small_gpt_config(vocab_size=65)
    save_standalone(tmp_path / "gpt", config, GPT(config).state_dict())
    with pytest.raises(InputError, match="they do not match"):
        open_models([checkpoints / "tokenizer", tmp_path / "gpt"])


def test_class_names_must_be_as_many_as_classes(checkpoints, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n\nowl\nbee\nfly\n")
    assert open_models([checkpoints], class_names=names).class_names[2] == "2: owl"
    names.write_text("cat\n")
    with pytest.raises(InputError, match="names 1 classes, the GPT has 5"):
        open_models([checkpoints], class_names=names)
    with pytest.raises(InputError, match="belongs to a GPT"):
        open_models([checkpoints / "tokenizer"], class_names=names)


# Uploads


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_what_is_uploaded_is_decoded(tmp_path, form):
    photo(0).save(tmp_path / "photo", format=form)
    image = read_upload(tmp_path / "photo", LIMITS)
    assert image.mode == "RGB" and image.size == (40, 30)


@pytest.mark.parametrize(("content", "said"), [
    (bomb(10_000, 10_000), "10000 x 10000 pixels, 100 megapixels; at most 50"),
    (bomb(20_000, 20_000), "more than 178 megapixels; at most 50"),
    (b"hello " * 100, "not an image that can be read"), (b"", "not an image that can be read"),
    (bytes(600_000), "at most 0.5 MB"), (png_bytes(photo(0))[:-40], "cannot decode"),
    (bomb(10_000, 10), "sides may differ"),
])
def test_what_is_no_fair_image_is_refused_by_name(tmp_path, monkeypatch, content, said):
    if "megapixels" in said:
        monkeypatch.setattr(uploads, "decode_image", None)  # its header is enough
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(InputError, match=said) as refusal:
        read_upload(tmp_path / "photo.png", LIMITS)
    assert str(refusal.value).startswith("photo.png: ")


def test_other_formats_are_refused(tmp_path):
    for form, said in (("BMP", "this is a BMP"), ("GIF", "not an image that can be read")):
        photo(0).save(tmp_path / "photo.png", format=form)
        with pytest.raises(InputError, match=f"{said}.*JPEG, PNG or WebP"):
            read_upload(tmp_path / "photo.png", LIMITS)


def test_limits_must_be_sensible():
    for total in (1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"--max-total-megabytes is .*at least --max-megabytes"):
            Limits(total_megabytes=total)
    for limits in ({"megabytes": 0}, {"megapixels": 0}, {"megapixels": 90}, {"megabytes": float("nan")}):
        with pytest.raises(InputError, match="must be above 0"):
            Limits(**limits)


# The server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(models):
    with served(models, LIMITS, port=free_port()) as address:
        yield address.rstrip("/")


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client


def join(client, name, inputs, session):
    config = client.get("/config").json()
    event = next(event["id"] for event in config["dependencies"] if event["api_name"] == name)
    return client.post("/gradio_api/queue/join", json={"data": inputs, "fn_index": event, "session_hash": session})


def result(client, session):
    """Whether the session's event succeeded, and what it gave."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message["success"], message["output"]
    raise AssertionError("the event did not end")


def call(client, name, inputs, session):
    assert join(client, name, inputs, session).status_code == 200
    return result(client, session)


def upload(client, content, name="photo.png"):
    answer = client.post("/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def picture(client, value):
    return np.asarray(
        Image.open(io.BytesIO(client.get(f"/gradio_api/file={value['path']}").raise_for_status().content))
    )


def test_over_http_the_page_gives_what_the_views_give(client, models):
    one, other = (views.encoded(models.tokenizer, photo(seed)) for seed in (0, 1))
    done, output = call(client, "read", [upload(client, png_bytes(photo(0)))], "session")
    assert done
    _, seen, restored, distance, strip, codes, said = output["data"]
    for value, expected in ((seen, one.picture), (restored, one.reconstruction),
                            (distance, views.difference(one.picture, one.reconstruction))):
        assert np.array_equal(picture(client, value), expected.repeat(16, 0).repeat(16, 1))
    assert np.array_equal(picture(client, strip), views.strip(one.codes, models.colours))
    assert codes == " ".join(map(str, one.codes)) and f"PSNR {one.psnr:.2f} dB" in said
    assert call(client, "read_other", [upload(client, png_bytes(photo(1)))], "session")[0]
    done, output = call(client, "swap", [None, None, 0, 8], "session")
    assert done and np.array_equal(picture(client, output["data"][0]), other.reconstruction.repeat(16, 0).repeat(16, 1))
    done, output = call(client, "keep_first", [None, 9], "session")
    assert not done and "8" in output["error"]


def test_over_http_uploads_are_refused_with_a_message(client):
    done, output = call(client, "read", [upload(client, bomb(10_000, 10_000), "<b>bomb.png")], "refused")
    assert not done and "100 megapixels; at most 50 are decoded" in output["error"] and "<b>" not in output["error"]
    done, output = call(client, "read", [upload(client, b"hello")], "refused")
    assert not done and "not an image that can be read" in output["error"]
    assert client.post("/gradio_api/upload", files={"files": ("large.png", bytes(LIMITS.bytes + 1))}).status_code == 413
    assert client.post("/gradio_api/upload", files={"files": ("large.png", bytes(2 * LIMITS.bytes))}).status_code == 413
    chunks = iter([b"--x\r\n"] * 3)
    assert client.post("/gradio_api/upload", content=chunks, headers={"content-type": "multipart/form-data; boundary=x"}
                       ).status_code == 411


def test_no_file_of_the_machine_is_read(client, checkpoints, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png_bytes(photo(3)))
    own = Path(upload(client, png_bytes(photo(0)))["path"])
    weights = checkpoints / "tokenizer" / "config.json"
    for path in ("/etc/passwd", secret, weights, Path(__file__), f"{own.parent}/../../../../../../etc/passwd",
                 own.parent.parent):
        for address in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/file={path}", f"/static/{path}",
                        f"/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f{path}",
                        f"/assets/..%2f..%2f..%2f..%2f..%2f..{path}"):
            answer = client.get(address)
            assert answer.status_code in (403, 404) and b"root:" not in answer.content
    for path in (secret, "/etc/passwd", f"{own.parent}/../../../../../../{secret}"):
        done, output = call(client, "read", [{"path": str(path), "meta": {"_type": "gradio.FileData"}}], "paths")
        assert not done and "root:" not in json.dumps(output)


def test_nothing_is_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/photo.png"
        for value in ({"path": url, "meta": {"_type": "gradio.FileData"}}, {"deep": [{"path": url}]}):
            assert join(client, "read", [value], "urls").status_code == 403
        assert client.get(f"/gradio_api/file={url}").status_code == 404
        with pytest.raises(TimeoutError):
            listener.accept()


def test_only_the_page_is_answered(client):
    host = client.base_url.netloc.decode()
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"origin": f"http://{host}"}).status_code == 200
    for headers in ({"host": "attacker.example"}, {"origin": "http://attacker.example"}, {"origin": "null"},
                    {"origin": "http://127.0.0.1:1"}):
        assert client.get("/", headers=headers).status_code == 403
        assert client.post("/gradio_api/queue/join", json={}, headers=headers).status_code == 403
    for path in ("/gradio_api/proxy=https://a.hf.space/", "/monitoring", "/gradio_api/runs", "/gradio_api/deep_link",
                 "/gradio_api/vibe-code/", "/gradio_api/info", "/gradio_api/openapi.json", "/docs", "/login"):
        assert client.get(path).status_code == 404
    for path in ("process_recording", "component_server", "run/read", "call/read"):
        assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404
    assert client.post("/gradio_api/queue/join", content=b"[" * 10**5).status_code == 400
    assert client.post("/gradio_api/queue/join", content=bytes(10**6 + 1)).status_code == 413


def raw(address, *lines, body=b""):
    """The status of a request that httpx would not send."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in (*lines, "Connection: close", "")).encode() + body)
        answer = connection.makefile("rb").readline()
    return int(answer.split()[1]) if answer else None


def test_names_that_are_none_are_refused(address):
    host = address.removeprefix("http://")
    for header in ("Host: [::1", "Host: [", "Host: ]:7", "Host: a b"):
        assert raw(address, "GET / HTTP/1.1", header) in (400, 403)
    for origin in ("http://[", "http://]", "[", "http://[::1"):
        assert raw(address, "GET / HTTP/1.1", f"Host: {host}", f"Origin: {origin}") == 403
    assert raw(address, "GET / HTTP/1.1", f"Host: {host}", f"Origin: http://{host}",
               "Origin: http://attacker.example") == 400


def test_an_upload_that_tells_its_length_in_two_ways_is_refused(address):
    host = address.removeprefix("http://")
    part = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(3 * LIMITS.bytes)
        + b"\r\n--x--\r\n"
    )
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part)
    head = ["POST /gradio_api/upload HTTP/1.1", f"Host: {host}", "Content-Type: multipart/form-data; boundary=x"]
    for more in (["Content-Length: 10", "Transfer-Encoding: chunked"],
                 ["Transfer-Encoding: chunked", "Content-Length: 10"],
                 ["Transfer-Encoding: chunked"], ["Content-Length: 10", "Content-Length: 20"], ["Content-Length: +10"],
                 ["Content-Length: -1"], ["Content-Length: 9" + "9" * 30]):
        try:
            status = raw(address, *head, *more, body=chunked)
        except (ConnectionResetError, BrokenPipeError):  # answered before it had read all
            continue
        assert status in (400, 411, 413), more


def test_a_stream_that_is_longer_than_it_said_is_cut():
    import asyncio

    sent, seen = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            seen.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": bytes(100), "more_body": True}

    async def send(message):
        sent.append(message)

    guard = Guard(app, None, 10**6, Path("nowhere"), 10**7)
    scope = {"type": "http", "method": "POST", "path": UPLOAD,
             "headers": [(b"content-length", b"250"), (b"host", b"h")]}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 413 and sum(seen) == 200 and guard.arriving == 0


def test_uploads_are_bounded_in_total(models):
    limits = Limits(megabytes=0.5, megapixels=50, total_megabytes=1.2)
    with served(models, limits, port=free_port()) as address, httpx.Client(base_url=address, trust_env=False) as client:
        answers = [client.post("/gradio_api/upload", files={"files": (f"{number}.png", bytes([number]) * 400_000)})
                   for number in range(6)]
    codes = [answer.status_code for answer in answers]
    assert codes[0] == 200 and codes[-1] == 507 and "the last hour" in answers[-1].text


def test_computations_take_turns_and_few_may_wait(client, monkeypatch):
    active, most, go = [0], [0], threading.Event()

    def samples(*arguments, **settings):
        active[0] += 1
        most[0] = max(most[0], active[0])
        go.wait(30)
        time.sleep(0.01)
        active[0] -= 1
        return np.zeros((16, 16, 3), dtype=np.uint8)

    monkeypatch.setattr(page_module.views, "samples", samples)
    inputs = [[0], 1, 2.0, 1.0, 0, 0]
    first = join(client, "sample", inputs, "turn-0")
    deadline = time.monotonic() + 30
    while not active[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    answers = [join(client, "sample", inputs, f"turn-{number}") for number in range(1, WAITING + 2)]
    assert [answer.status_code for answer in (first, *answers)] == [200] * (WAITING + 1) + [503]
    go.set()
    assert all(result(client, f"turn-{number}")[0] for number in range(WAITING + 1))
    assert most[0] == 1


def test_the_directory_of_uploads_goes_with_the_server(models, monkeypatch):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    with served(models, LIMITS, port=free_port()) as address:
        with httpx.Client(base_url=address, trust_env=False) as client:
            path = Path(upload(client, png_bytes(photo(0)))["path"])
            assert client.get("/gradio_api/file=/etc/passwd").status_code == 403
        folder = next(parent for parent in path.parents if parent.name.startswith("gigatok-ds.app."))
        assert path.is_file() and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_cannot_be_served_is_told(models, address, monkeypatch, capsys, checkpoints):
    port = address.rpartition(":")[2]
    assert main(["app", str(checkpoints), "--port", port]) == 2
    assert f"nothing can listen at 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["app", str(checkpoints), "--port", "0"]) == 2
    assert "it must be from 1 to 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'gigatok_ds\[app\]'"), served(models, LIMITS, port=free_port()):
        pass


def test_a_tokenizer_alone_has_a_page(models):
    page = page_module.build_page(Models(tokenizer=models.tokenizer), LIMITS)
    names = {event["api_name"] for event in page.config["dependencies"]}
    assert {"read", "keep_first", "swap"} <= names and "sample" not in names


# A browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


@pytest.fixture
def browser(address):
    """A tab that shows the page, and the addresses it asked other servers for."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: neither chromium, chromium-browser nor google-chrome is in PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab, elsewhere = chromium.new_page(), []
        tab.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
               or elsewhere.append(request.url))
        tab.goto(address)
        tab.wait_for_selector("#upload input[type=file]", state="attached", timeout=60_000)
        yield tab, elsewhere
        chromium.close()


def drop(tab, where, content, name):
    tab.set_input_files(f"#{where} input[type=file]", [{"name": name, "mimeType": "image/png", "buffer": content}])


def shown(tab, where):
    """The picture in a panel, once it is loaded."""
    image = tab.wait_for_selector(f"#{where} img", timeout=60_000)
    tab.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image)
    return np.asarray(Image.open(io.BytesIO(tab.request.get(image.get_attribute("src")).body())))


def refusal(tab):
    text = tab.wait_for_selector(".toast-body", timeout=60_000).inner_text()
    tab.locator(".toast-close").first.click()
    tab.wait_for_selector(".toast-body", state="detached")
    return text


def test_in_a_browser(browser, models):
    tab, elsewhere = browser
    drop(tab, "upload", png_bytes(photo(0)), "one.png")
    one, other = (views.encoded(models.tokenizer, photo(seed)) for seed in (0, 1))
    assert np.array_equal(shown(tab, "reconstruction"), one.reconstruction.repeat(16, 0).repeat(16, 1))
    shown(tab, "kept")
    assert tab.input_value("#codes textarea, #codes input") == " ".join(map(str, one.codes))
    drop(tab, "other-upload", png_bytes(photo(1)), "other.png")
    ours, _ = views.swapped(one.codes, other.codes, 0, 4)
    assert np.array_equal(shown(tab, "ours"), views.decoded(models.tokenizer, ours).repeat(16, 0).repeat(16, 1))

    tab.click("#upload button[aria-label=Clear]")
    for panel in ("reconstruction", "kept", "ours"):
        tab.wait_for_selector(f"#{panel} img", state="detached", timeout=60_000)
    drop(tab, "upload", bomb(10_000, 10_000), "bomb.png")
    assert "bomb.png: 10000 x 10000 pixels, 100 megapixels; at most 50 are decoded" in refusal(tab)
    tab.click("#other-upload button[aria-label=Clear]")
    drop(tab, "other-upload", b"hello", "text.png")
    assert "text.png: this is not an image that can be read" in refusal(tab)
    drop(tab, "upload", b"hello", "notes.txt")
    assert "notes.txt" in refusal(tab)
    drop(tab, "upload", bytes(600_000), "large.png")
    assert "large.png" in refusal(tab)
    drop(tab, "upload", png_bytes(photo(1)), "other.png")  # a refused file has left the place free
    assert np.array_equal(shown(tab, "reconstruction"), other.reconstruction.repeat(16, 0).repeat(16, 1))

    tab.get_by_role("tab", name="Samples").click()
    # What is shown can be changed now.
    tab.wait_for_function("() => document.querySelector('#seed input').value === '0'")
    tab.fill("#seed input", "3")
    with tab.expect_request("**/queue/join*") as request:
        tab.click("#draw")
    assert request.value.post_data_json["data"] == [[0, 1, 2, 3], 8, 1.75, 1, 0, 3]
    drawn = shown(tab, "samples")
    expected = views.samples(models.gpt, models.tokenizer, [0, 1, 2, 3], per_class=8, guidance=1.75, temperature=1,
                             top_k=0, seed=3)
    assert np.array_equal(drawn, expected.repeat(6, 0).repeat(6, 1))
    assert elsewhere == []
