"""Files of frozen networks: where they are looked for, what is fetched, and that a run keeps to the same ones."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import constants
from training_runs import prepare, start

from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.losses.feature_distance import RESNET_URL
from gigatok_ds.losses.frozen import weight_files
from gigatok_ds.losses.perceptual import VGG_URL
from gigatok_ds.losses.semantic import teacher_file
from gigatok_ds.models.frozen.pretrained_files import WeightFile, cache_folder
from gigatok_ds.training.frozen_weights import check_frozen, random_weight_warnings, record_frozen

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def published(tmp_path):
    """A file and its address; the name tells the first digits of its SHA-256."""
    path = tmp_path / "published" / f"net-{DIGEST[:8]}.pth"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def weight_file(published, value, **changes):
    settings = dict(setting="loss.some.weights", value=value, what="the network", names=(published.name, "other.pth"),
                    url=published.as_uri())
    return WeightFile(**settings | changes)


def test_a_path_is_a_file_or_a_directory_with_one_of_its_names(published, tmp_path):
    assert weight_file(published, str(published)).find() == published
    assert weight_file(published, published.parent).find() == published
    (tmp_path / "other.pth").write_bytes(CONTENT)
    assert weight_file(published, tmp_path).find() == tmp_path / "other.pth"
    for value in (tmp_path / "nowhere", cache_folder()):
        with pytest.raises(InputError, match=f"weights: there is no file {value}; it should be the network from "):
            weight_file(published, value).find()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"empty holds none of {published.name}, other.pth"):
        weight_file(published, tmp_path / "empty").find()


def test_without_a_path_the_caches_are_searched(published, tmp_path):
    file = weight_file(published, None, hub="timm/some_vit.tag")
    with pytest.raises(InputError, match=f"{published.name}, nor timm/some_vit.tag in the Hugging Face"):
        file.find()
    snapshot = tmp_path / "hub" / "models--timm--some_vit.tag" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(CONTENT)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert file.find() == snapshot / "model.safetensors"
    cache_folder().mkdir(parents=True)
    (cache_folder() / "other.pth").write_bytes(CONTENT)
    assert file.find() == cache_folder() / "other.pth"


def test_a_download_is_wanted_checked_and_done_once(published):
    weight_file(published, None).fetch()
    assert not cache_folder().exists()  # nobody asked for it
    file = weight_file(published, "download")
    assert file.wants_download
    file.fetch()
    assert file.find() == cache_folder() / published.name and file.find().read_bytes() == CONTENT
    published.unlink()
    file.fetch()
    assert file.sha256() == DIGEST


def test_a_download_that_fails_or_is_another_file_leaves_nothing(published):
    file = weight_file(published, "download")
    published.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"cannot be downloaded .*invalid hash value"):
        file.fetch()
    published.unlink()
    with pytest.raises(InputError, match=r"loss.some.weights: file://.* cannot be downloaded"):
        file.fetch()
    assert not list(cache_folder().iterdir())
    with pytest.raises(InputError, match="is not published; give a path"):
        weight_file(published, "download", url=None).fetch()


def test_a_damaged_file_is_found_by_its_name(published):
    published.write_bytes(b"cut off")
    with pytest.raises(InputError, match=f"damaged: its SHA-256 begins with .* not with {DIGEST[:8]}"):
        weight_file(published, published).sha256()


def test_addresses_are_those_of_torchvision_and_timm():
    from torchvision.models import ResNet50_Weights, VGG16_Weights

    assert (VGG16_Weights.IMAGENET1K_V1.url, ResNet50_Weights.IMAGENET1K_V2.url) == (VGG_URL, RESNET_URL)
    siglip = teacher_file("siglip-so400m", None)
    assert siglip.hub == "timm/vit_so400m_patch14_siglip_224.webli" and siglip.url.endswith(
        "timm/vit_so400m_patch14_siglip_224.webli/resolve/main/model.safetensors")
    assert teacher_file("dinov2reg-vit-g", None).url.endswith("/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth")


def recipe(*overrides):
    return load_recipe("VQ_BL256_dino_disc", overrides)


def settings(recipe):
    return [file.setting for file in weight_files(recipe.loss)]


def test_each_network_of_a_recipe_has_its_file():
    assert settings(recipe()) == ["loss.perceptual.weights", "the lpips package", "loss.semantic.weights",
                                  "loss.adversarial.backbone_weights"]
    assert settings(recipe("loss.perceptual.model=resnet50", "loss.semantic=null", "model.semantic_head=null",
                           "loss.adversarial=null")) == ["loss.perceptual.weights"]
    names = [weight_files(recipe(f"loss.perceptual.model={model}").loss)[0].names[0]
             for model in ("vgg", "dinov2-s", "resnet50")]
    assert names == ["vgg16-397923af.pth", "dinov2_vits14_pretrain.pth", "resnet50-11ad3fa6.pth"]


RANDOM = [f"loss.{name}=random" for name in ("perceptual.weights", "semantic.weights", "adversarial.backbone_weights")]


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_file_is_told_before_anything_is_built(missing):
    given = [*RANDOM[:missing], *RANDOM[missing + 1 :]]
    check_frozen(recipe(*RANDOM))
    with pytest.raises(InputError, match=f"{RANDOM[missing].removesuffix('=random')}: there is no file .*; put it "):
        check_frozen(recipe(*given))
    assert len(random_weight_warnings(recipe(*given))) == 2


def test_a_head_of_another_width_and_an_unknown_teacher_are_told_first():
    with pytest.raises(InputError, match=r"teacher_width is 768, but the tokens of siglip-so400m .* are 1152 wide"):
        check_frozen(recipe(*RANDOM, "loss.semantic.teacher=siglip-so400m"))
    with pytest.raises(InputError, match="did you mean dinov2-vit-b"):
        check_frozen(recipe(*RANDOM, "loss.semantic.teacher=dinov2-vit-bb"))


def test_only_the_first_rank_of_a_host_downloads(monkeypatch, published):
    ours = weight_file(published, "download")
    monkeypatch.setattr("gigatok_ds.training.frozen_weights.weight_files", lambda loss: [ours])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    check_frozen(recipe())
    assert ours.wants_download
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_frozen(recipe())
    assert not ours.wants_download


def test_a_run_keeps_to_the_files_it_was_started_with(tmp_path):
    path = tmp_path / "vgg.pth"
    torch.save({"any": torch.zeros(1)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    ours = recipe(*RANDOM[1:], f"loss.perceptual.weights={path}")
    for _ in range(2):
        record_frozen(ours, tmp_path, since=tmp_path)
        content = json.loads((tmp_path / "frozen_weights.json").read_text())
        assert content["loss.perceptual.weights"] == {"file": "vgg.pth", "sha256": digest}
        assert content["loss.semantic.weights"] == {"file": None, "sha256": None}
        assert len(content["the lpips package"]["sha256"]) == 64
    moved = path.rename(tmp_path / "moved.pth")
    record_frozen(recipe(*RANDOM[1:], f"loss.perceptual.weights={moved}"), tmp_path, since=tmp_path)
    torch.save({"any": torch.ones(1)}, moved)
    for weights, said in ((moved, "this is a file of SHA-256"), ("random", "this is random weights")):
        with pytest.raises(InputError, match=f"loss.perceptual.weights: .*with a file of .*{digest[:16]}.*{said}"):
            record_frozen(recipe(*RANDOM[1:], f"loss.perceptual.weights={weights}"), tmp_path, since=tmp_path)
    assert "moved.pth" in (tmp_path / "frozen_weights.json").read_text()


SMALL = ["model.image_size=32", "model.semantic_head={depth: 1, teacher_width: 192}", "training.steps=1",
         "schedule.warmup_steps=1",
         "loss.semantic={teacher: vit_tiny_patch16_224, weights: random}", "loss.auxiliary={end_step: 6}",
         "training.global_batch_size=2", "training.validate_every=1", "checkpoint.every=1"]


@pytest.mark.slow
def test_a_run_says_and_records_what_its_losses_looked_through(tmp_path):
    """In a process of its own, with a ViT as teacher and LPIPS on random weights, in bfloat16."""
    data = prepare(tmp_path)["tokenizer"]
    arguments = [tmp_path / "tokenizer.yaml", "--out", tmp_path / "run", *data, *SMALL, "training.precision=bf16"]
    code, output = start([*arguments, "loss.perceptual={}"])
    assert code == 2 and "loss.perceptual.weights: there is no file" in output and not (tmp_path / "run").exists()
    code, output = start([*arguments, "loss.perceptual={weights: random}"])
    assert code == 0, output
    assert output.count("weights is random") == 2
    content = json.loads((tmp_path / "run" / "frozen_weights.json").read_text())
    assert list(content) == ["loss.perceptual.weights", "the lpips package", "loss.semantic.weights"]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss/perceptual"] > 0 and -0.5 < line["loss/semantic"] < 0.5
