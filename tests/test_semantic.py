"""The frozen teacher: preprocessing, files in both namings, and the alignment loss."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gigatok_ds.errors import InputError
from gigatok_ds.losses.semantic import TEACHERS, Teacher, alignment_loss, preprocess


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(size=64):
    return torch.rand(2, 3, size, size, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def published():
    """A DINOv2 S in Meta's naming at its published size, 37 x 37 positions, plain and with registers."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    assert plain["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    plain = {name: torch.randn_like(value) * value.std() if name.endswith("bias") else value.clone()
             for name, value in plain.items()}
    plain["mask_token"] = torch.zeros(1, 384)
    # Meta lets registers carry no position, and the class token the first.
    return {"plain": plain, "registers": plain | {"register_tokens": torch.randn(1, 4, 384) * 0.02}}


@pytest.fixture(scope="module")
def files(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    for name, state in published.items():
        torch.save(state, folder / f"{name}.pth")
    return folder


def tokens_by_hand(state, images):
    """Meta's forward pass on timm's blocks: positions resampled with antialiasing, registers second."""
    network = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    table = state["pos_embed"]
    grid = table[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    loadable = {name: value for name, value in state.items() if name in network.state_dict()}
    network.load_state_dict(loadable | {"pos_embed": torch.cat([table[:, :1], grid], 1)})
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = F.interpolate(((images + 1) / 2 - mean) / std, size=(224, 224), mode="bicubic")
    x = torch.cat([network.cls_token.expand(len(x), -1, -1), network.patch_embed(x)], 1) + network.pos_embed
    registers = state.get("register_tokens", torch.zeros(1, 0, 384))
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    return network.norm(network.blocks(x))[:, 1 + registers.shape[1] :]


@pytest.mark.parametrize("teacher, state", [("dinov2-vit-s", "plain"), ("dinov2reg-vit-s", "registers")])
def test_metas_files_give_metas_patch_tokens(teacher, state, published, files):
    with torch.no_grad():
        expected = tokens_by_hand(published[state], pictures())
    ours = Teacher(teacher, files / f"{state}.pth")(pictures())
    assert ours.shape == (2, 256, 384) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("teacher, state", [("dinov2-vit-s", "plain"), ("dinov2reg-vit-s", "registers")])
def test_timms_files_give_the_same_tokens(teacher, state, published, files, tmp_path):
    metas_own = ("mask_token", "register_tokens")
    timms = {name: value for name, value in published[state].items() if name not in metas_own}
    if state == "registers":
        timms["reg_token"] = published[state]["register_tokens"]
        timms["cls_token"] = timms["cls_token"] + timms["pos_embed"][:, :1]
        timms["pos_embed"] = timms["pos_embed"][:, 1:]
    save_file({name: value.contiguous() for name, value in timms.items()}, tmp_path / "model.safetensors")
    ours = Teacher(teacher, tmp_path / "model.safetensors")(pictures())
    torch.testing.assert_close(ours, Teacher(teacher, files / f"{state}.pth")(pictures()), rtol=0, atol=1e-5)


def test_images_are_normalised_before_they_are_resized():
    images = pictures(256)
    ours = preprocess(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = F.interpolate(((images + 1) / 2 - mean) / std, (224, 224), mode="bicubic", align_corners=False)
    assert ours.shape == (2, 3, 224, 224)
    torch.testing.assert_close(ours, expected)
    antialiased = F.interpolate(((images + 1) / 2 - mean) / std, (224, 224), mode="bicubic", antialias=True)
    assert (ours - antialiased).abs().max() > 0.1
    constant = preprocess(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(constant, ((1 - mean) / std).expand(1, 3, 224, 224), rtol=0, atol=1e-5)


def test_random_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = Teacher("dinov2-vit-s", random_weights=True).train()
    assert not teacher.training and not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(pictures().requires_grad_()).requires_grad


@pytest.mark.parametrize("weights", [None, "nowhere.pth"])
def test_missing_weights_name_the_key_and_the_file(weights):
    with pytest.raises(InputError, match="loss.semantic.weights.*dinov2_vitb14_pretrain.pth"):
        Teacher("dinov2-vit-b", weights)


def test_an_unknown_teacher_and_another_size_are_refused(files):
    with pytest.raises(InputError, match="loss.semantic.teacher is 'dinov3'; choose one of dinov2-vit-s"):
        Teacher("dinov3", random_weights=True)
    with pytest.raises(InputError, match="loss.semantic.weights: .* holds another network"):
        Teacher("dinov2-vit-b", files / "plain.pth")
    with pytest.raises(InputError, match="holds another network"):
        Teacher("dinov2reg-vit-s", files / "plain.pth")


@pytest.mark.parametrize("name, width", [("s", 384), ("b", 768), ("l", 1024)])
def test_every_teacher_has_its_width(name, width):
    for family, registers in (("dinov2", 0), ("dinov2reg", 4)):
        with torch.device("meta"):
            network = timm.create_model(TEACHERS[f"{family}-vit-{name}"][0], num_classes=0)
        assert (network.embed_dim, network.num_prefix_tokens) == (width, 1 + registers)


def test_alignment_is_minus_the_mean_cosine():
    student, target = torch.randn(2, 2, 4, 6, generator=seeded())
    expected = -F.cosine_similarity(student, target, dim=-1).mean()
    torch.testing.assert_close(alignment_loss(student, target), expected)
    assert alignment_loss(3 * target, target).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(-target, 2 * target).item() == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match="64 tokens of width 24, the teacher 256 of width 384.*_width"):
        alignment_loss(torch.zeros(1, 64, 24), torch.zeros(1, 256, 384))
