"""The frozen teacher: preprocessing, files in both namings, and the alignment loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gigatok_ds.compat import timm_library
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.losses import SemanticConfig
from gigatok_ds.errors import InputError
from gigatok_ds.losses.semantic import Teacher, alignment_loss, check_teacher, teacher_file
from gigatok_ds.models.latent_decoder import semantic_head


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(size=64):
    return torch.rand(2, 3, size, size, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def published():
    """A DINOv2 S in Meta's naming at its published size, 37 x 37 positions, plain and with registers."""
    torch.manual_seed(0)
    plain = timm_library().create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
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
    network = timm_library().create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
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


def by_hand(images, mean, std, size, *, normalise_first):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    x = (images + 1) / 2
    if normalise_first:
        return F.interpolate((x - mean) / std, (size, size), mode="bicubic", align_corners=False)
    return (F.interpolate(x, (size, size), mode="bicubic", align_corners=False) - mean) / std


@pytest.mark.parametrize("teacher, grid, size, mean, std, normalise_first", [
    ("dinov2-vit-s", 16, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
    ("vit_base_patch16_siglip_224", 8, 128, (0.5,) * 3, (0.5,) * 3, False),
    ("vit_base_patch32_clip_224", 4, 128, (0.48145466, 0.4578275, 0.40821073),
     (0.26862954, 0.26130258, 0.27577711), False),
])
def test_images_are_prepared_as_the_teacher_was_trained(teacher, grid, size, mean, std, normalise_first):
    network = Teacher(teacher, "random", grid=grid)
    images = pictures(256)
    ours = network.vit.preprocess(images)
    assert ours.shape == (2, 3, size, size)
    # Bit for bit: the two orders differ by rounding only.
    assert torch.equal(ours, by_hand(images, mean, std, size, normalise_first=normalise_first))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    antialiased = F.interpolate(((images + 1) / 2 - mean) / std, (size, size), mode="bicubic", antialias=True)
    assert (ours - antialiased).abs().max() > 0.1
    assert network(images).shape == (2, grid * grid, network.vit.width)


def test_random_teacher_is_frozen_seeded_and_stays_in_evaluation_mode():
    state = torch.get_rng_state()
    teacher = Teacher("dinov2-vit-s", "random").train()
    assert torch.equal(torch.get_rng_state(), state)
    assert not teacher.vit.training and not teacher.vit.network.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    tokens = teacher(pictures().requires_grad_())
    assert not tokens.requires_grad
    torch.manual_seed(5)
    assert torch.equal(Teacher("dinov2-vit-s", "random")(pictures()), tokens)


def test_on_a_cpu_the_teacher_follows_the_precision_of_training():
    exact = Teacher("dinov2-vit-s", "random", grid=4)(pictures())
    ours = Teacher("dinov2-vit-s", "random", grid=4, precision="bf16")(pictures())
    assert ours.dtype == torch.float32
    assert 0 < (1 - F.cosine_similarity(ours, exact, dim=-1)).max() < 1e-3


@pytest.mark.parametrize("weights", [None, "nowhere.pth"])
def test_missing_weights_name_the_key_the_file_and_where_it_is_published(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"loss.semantic.weights.*dinov2_vitb14_pretrain.pth.* from https://") as error:
        Teacher("dinov2-vit-b", weights)
    assert str(tmp_path / "hub" / "checkpoints" if weights is None else weights) in str(error.value)


@pytest.mark.parametrize("name, said", [
    ("dinov3", "'dinov3', which is not known; .*Choose one of dinov2-vit-s"),
    ("siglip-sovit-400m", "did you mean siglip-so400m"),
    ("vit_base_patch14_dino2", "did you mean .*vit_base_patch14_dinov2"),
    ("resnet18", "a timm model, but not a VisionTransformer"),
    ("vit_base_patch16_dinov3", "a timm model, but not a VisionTransformer"),
    ("vit_base_patch16_224.nonsense", "Invalid pretrained tag"),
])
def test_an_unknown_teacher_is_refused_with_near_names(name, said):
    with pytest.raises(InputError, match=f"loss.semantic.teacher is .*{said}") as error:
        teacher_file(name, "random")
    assert "\n" not in str(error.value)


def test_another_networks_file_is_refused(files):
    for teacher, state in (("dinov2-vit-b", "plain"), ("dinov2reg-vit-s", "plain"), ("siglip-so400m", "plain")):
        with pytest.raises(InputError, match=r"loss.semantic.weights: .* holds another network"):
            Teacher(teacher, files / f"{state}.pth")


@pytest.mark.parametrize("name, width, file", [
    ("dinov2-vit-s", 384, "dinov2_vits14_pretrain.pth"), ("dinov2-vit-b", 768, "dinov2_vitb14_pretrain.pth"),
    ("dinov2-vit-l", 1024, "dinov2_vitl14_pretrain.pth"), ("dinov2-vit-g", 1536, "dinov2_vitg14_pretrain.pth"),
    ("dinov2reg-vit-s", 384, "dinov2_vits14_reg4_pretrain.pth"),
    ("dinov2reg-vit-b", 768, "dinov2_vitb14_reg4_pretrain.pth"),
    ("dinov2reg-vit-l", 1024, "dinov2_vitl14_reg4_pretrain.pth"),
    ("dinov2reg-vit-g", 1536, "dinov2_vitg14_reg4_pretrain.pth"),
    ("siglip-so400m", 1152, "vit_so400m_patch14_siglip_224.webli.safetensors"),
    ("clip-dfn-vit-l", 1024, "vit_large_patch14_clip_quickgelu_224.dfn2b.safetensors"),
    ("vit_tiny_patch16_224.augreg_in21k", 192, "vit_tiny_patch16_224.augreg_in21k.safetensors"),
])
def test_the_semantic_head_must_be_as_wide_as_the_teacher(name, width, file):
    assert teacher_file(name, None).names[0] == file
    model = load_recipe("VQ_SS256", [f"model.semantic_head.teacher_width={width}"]).model
    check_teacher(SemanticConfig(teacher=name), model)
    narrow = load_recipe("VQ_SS256", ["model.semantic_head.teacher_width=24"]).model
    with pytest.raises(InputError, match=f"teacher_width is 24, but .*set model.semantic_head.teacher_width={width}$"):
        check_teacher(SemanticConfig(teacher=name), narrow)


@pytest.mark.parametrize("architecture", [
    "vit_tiny_patch16_224.augreg_in21k",  # a class token and a classifier
    "vit_base_patch32_siglip_256.v2_webli",  # no class token, pooled by attention
    "vit_little_patch16_reg4_gap_256.sbb_in1k",  # registers; the average of tokens is normalised, not the tokens
    "deit_tiny_distilled_patch16_224.fb_in1k",  # two tokens before the patches
])
def test_timms_published_files_give_their_normalised_patch_tokens(architecture, tmp_path):
    """Whole models as timm saves them, other grids, and what the network says of images of the published size."""
    torch.manual_seed(1)
    full = timm_library().create_model(architecture).eval()
    for norm in (full.norm, full.fc_norm):
        if isinstance(norm, torch.nn.LayerNorm):
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    save_file({name: value.contiguous() for name, value in full.state_dict().items()}, tmp_path / "model.safetensors")
    size, patch = full.patch_embed.img_size[0], full.patch_embed.patch_size[0]
    teacher = Teacher(architecture, tmp_path, grid=size // patch)
    images = pictures(size)
    with torch.no_grad():
        tokens = full.forward_features(teacher.vit.preprocess(images))[:, full.num_prefix_tokens :]
        if isinstance(full.norm, torch.nn.Identity):
            tokens = full.fc_norm(tokens)
    torch.testing.assert_close(teacher(images), tokens, rtol=0, atol=1e-5)
    assert Teacher(architecture, tmp_path, grid=5)(images).shape == (2, 25, full.embed_dim)


def test_alignment_is_minus_the_mean_cosine():
    student, target = torch.randn(2, 2, 4, 6, generator=seeded())
    expected = -F.cosine_similarity(student, target, dim=-1).mean()
    torch.testing.assert_close(alignment_loss(student, target), expected)
    assert alignment_loss(3 * target, target).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(-target, 2 * target).item() == pytest.approx(1, abs=1e-6)


def test_a_teacher_beyond_half_precision_gives_finite_tokens_in_fp16_training():
    """Activations of some ViTs leave float16's range (65,504): in fp16 autocast their tokens are NaN."""
    exact, ours, naive = (Teacher("dinov2-vit-s", "random", grid=4, precision=precision)
                          for precision in ("fp32", "fp16", "fp32"))
    for teacher in (exact, ours, naive):
        for block in teacher.vit.network.blocks:
            block.mlp.fc1.weight.data *= 3e5
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert not naive.vit(pictures()).isfinite().all()
    tokens = ours(pictures())
    assert tokens.dtype == torch.float32
    assert (1 - F.cosine_similarity(tokens, exact(pictures()), dim=-1)).max() < 1e-2


def test_the_projection_beyond_half_precision_is_finite_in_fp16_training():
    """In float16 a hidden value is infinite and the term NaN; here it is near that of float64, with its gradient."""
    torch.manual_seed(0)
    head = semantic_head(32, 24)
    for layer in head[::2]:
        layer.weight.data *= 200
    x, target = torch.randn(2, 16, 32), torch.randn(2, 16, 24)

    def term(network, dtype):
        inputs = x.to(dtype).requires_grad_()
        loss = alignment_loss(network.to(dtype)(inputs), target)
        # Scaled, as DeepSpeed does in fp16.
        scaled = torch.autograd.grad(loss * 2**12, [inputs, *network.parameters()])
        return loss.detach(), [gradient.double() / 2**12 for gradient in scaled]

    naive = torch.nn.Sequential(*(torch.nn.Linear(layer.in_features, layer.out_features)
                                  if isinstance(layer, torch.nn.Linear) else layer for layer in head))
    naive.load_state_dict(head.state_dict())
    loss, gradients = term(copy.deepcopy(head), torch.float16)
    exact, wanted = term(copy.deepcopy(head), torch.float64)
    assert term(naive, torch.float16)[0].isnan()
    assert loss == pytest.approx(exact.item(), abs=2e-3)
    for gradient, true in zip(gradients, wanted, strict=True):
        assert gradient.isfinite().all()
        assert (gradient - true).norm() < 0.1 * true.norm(), "bfloat16's rounding in so steep a network"
