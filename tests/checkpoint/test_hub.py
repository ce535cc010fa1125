"""Models on a Hugging Face hub: here, a small server of this machine that speaks what the client asks for."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
import torch
from small_models import small_gpt, small_tokenizer

import gigatok_ds
from gigatok_ds.checkpoint import standalone
from gigatok_ds.checkpoint.standalone import codes_sha256, load_tokenizer, save_standalone


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories in memory; every file is sent and taken as a regular one."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def answer(self, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(200 if content is not None else 404)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        if match := re.match(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?(\?.*)?$", self.path):
            files = self.repositories[match[1]]
            return self.answer({"id": match[1], "sha": "1" * 40, "siblings": [{"rfilename": name} for name in files]})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
            return self.answer([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                                for name, data in self.repositories[match[1]].items()])
        if match := re.match(r"/([^/]+/[^/]+)/resolve/\w+/([^?]+)", self.path):
            data = self.repositories[match[1]].get(match[2])
            if data is None:
                return self.answer(None)
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit="1" * 40)
        return self.answer(None)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories.setdefault(f"{asked.get('organization') or 'me'}/{asked['name']}", {})
            return self.answer({"url": f"http://{self.headers['Host']}/me/{asked['name']}",
                                "id": "me/" + asked["name"]})
        if self.path == "/api/validate-yaml":  # of the card's front matter
            return self.answer({"errors": [], "warnings": []})
        repository = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if "/preupload/" in self.path:
            return self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for file in json.loads(body)["files"]]})
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                self.repositories[repository][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            elif change["key"] == "deletedFile":
                del self.repositories[repository][change["value"]["path"]]
        return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"http://{self.headers['Host']}/c/1",
                            "hookOutput": "", "pullRequestUrl": None})


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.repositories.clear()
    Hub.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def on_hub(code, hub, tmp_path, *arguments):
    """Run Python that takes this server for the hub: huggingface_hub reads its address while it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_x",
                                "no_proxy": "127.0.0.1",
                                "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    finished = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                              env=environment, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_model_is_pushed_to_a_hub_and_comes_back(hub, tmp_path):
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict(), provenance={"recipe": "small"})
    on_hub("import sys, gigatok_ds; "
           "gigatok_ds.HubTokenizer.from_pretrained(sys.argv[1]).push_to_hub('me/small')", hub, tmp_path,
           tmp_path / "tok")
    assert set(Hub.repositories["me/small"]) >= {"config.json", "model.safetensors", "README.md"}
    assert json.loads(Hub.repositories["me/small"]["config.json"])["provenance"] == {
        "recipe": "small", "codes_sha256": codes_sha256(tokenizer.state_dict())}
    Hub.repositories["me/small"]["evil.py"] = b"raise SystemExit(1)"
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images")
    on_hub("import sys, torch, gigatok_ds; model = gigatok_ds.HubTokenizer.from_pretrained('me/small', revision='v2'); "
           "torch.save(model.encode(torch.load(sys.argv[1])), sys.argv[2])", hub, tmp_path, tmp_path / "images",
           tmp_path / "codes")
    assert torch.equal(torch.load(tmp_path / "codes"), tokenizer.encode(images))
    assert not any("evil" in path for path in Hub.asked), "only what a model consists of is fetched"
    assert any("v2" in path for path in Hub.asked)


def test_weights_that_were_pushed_before_do_not_stay_beside_the_new_ones(hub, tmp_path):
    """An index of several files would be read instead of the one file that is new."""
    Hub.repositories["me/small"] = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old",
                                    "notes.md": b"mine"}
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    on_hub("import sys, gigatok_ds; "
           "gigatok_ds.HubTokenizer.from_pretrained(sys.argv[1]).push_to_hub('me/small')", hub, tmp_path,
           tmp_path / "tok")
    assert sorted(Hub.repositories["me/small"]) == ["README.md", "config.json", "model.safetensors", "notes.md"]


def test_a_model_saved_over_a_larger_one_is_the_one_that_is_read(tmp_path, monkeypatch):
    first, second = small_tokenizer(), small_tokenizer()
    torch.nn.init.normal_(second.quant_conv.weight, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(standalone, "SHARD_BYTES", 100_000)
    gigatok_ds.HubTokenizer(first).save_pretrained(tmp_path / "tok")
    assert (tmp_path / "tok" / standalone.INDEX_FILE).is_file()
    monkeypatch.undo()
    gigatok_ds.HubTokenizer(second).save_pretrained(tmp_path / "tok")
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == ["README.md", "config.json",
                                                                          "model.safetensors"]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(load_tokenizer(tmp_path / "tok").encode(images), second.encode(images))


def test_a_directory_round_trip_of_both_kinds(tmp_path):
    tokenizer, gpt = small_tokenizer(), small_gpt()
    gigatok_ds.HubTokenizer(tokenizer, {"recipe": "mine"}).save_pretrained(tmp_path / "tok")
    gigatok_ds.HubGPT(gpt).save_pretrained(tmp_path / "gpt")
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == ["README.md", "config.json",
                                                                          "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "tok"], "nothing is left beside them"
    again = gigatok_ds.HubTokenizer.from_pretrained(tmp_path / "tok")
    assert again.origin["recipe"] == "mine" and again.config == tokenizer.config
    images, classes = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(load_tokenizer(tmp_path / "tok").encode(images), tokenizer.encode(images))
    small = gigatok_ds.HubGPT.from_pretrained(tmp_path / "gpt", dtype=torch.bfloat16)
    assert next(small.parameters()).dtype == torch.bfloat16
    assert gigatok_ds.generate(small, classes).shape == (2, 8)
    with pytest.raises(gigatok_ds.InputError, match="holds a gpt, not a tokenizer"):
        gigatok_ds.HubTokenizer.from_pretrained(tmp_path / "gpt")


@pytest.mark.parametrize("kind", ["tokenizer", "gpt"])
def test_the_card_says_how_to_use_the_model_and_that_works(kind, tmp_path):
    model = small_tokenizer() if kind == "tokenizer" else small_gpt()
    save_standalone(tmp_path / "m", model.config, model.state_dict(),
                    provenance={"recipe": "small", "checkpoint": "step-0000008", "weights": "ema",
                                "metrics": {"loss": 1.25, "images": 1_281_167, "data": "val"}})
    card = (tmp_path / "m" / "README.md").read_text()
    sha = json.loads((tmp_path / "m" / "config.json").read_text())["sha256"]["model.safetensors"]
    for word in ("library_name", sha, "step-0000008", "loss: `1.25`", "images: `1281167`", "data: `val`",
                 f"{sum(p.numel() for p in model.parameters()):,} parameters"):
        assert word in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("path/of/this/directory", str(tmp_path / "m"))
    names = {"images": torch.rand(2, 3, 16, 16) * 2 - 1, "classes": torch.tensor([0, 3])}
    exec(code, names)
    assert names["codes"].shape == (2, 8)


def test_without_huggingface_hub_it_says_what_to_install():
    code = ("import sys; sys.modules['huggingface_hub'] = None\nimport gigatok_ds\n"
            "try:\n    gigatok_ds.HubGPT\nexcept gigatok_ds.InputError as error:\n    print(error)")
    assert "pip install 'gigatok_ds[hub]'" in subprocess.run([sys.executable, "-c", code], capture_output=True,
                                                             text=True, check=True).stdout
