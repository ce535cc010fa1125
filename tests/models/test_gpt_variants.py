"""GPT variants: two-dimensional rotary positions, adaptive layer norm, stochastic depth; sizes, numbers, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import small_gpt_config

from gigatok_ds import InputError, generate
from gigatok_ds.checkpoint.original import build_on_meta, from_original, to_original
from gigatok_ds.config.model import GPT_SIZES, GPTConfig, TransformerSize
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.parallel.dropout import DropPath, dropout_at, name_dropouts
from gigatok_ds.sampling.generate import EagerDecoder

# Of 16,384 codes, 256 tokens and 1000 classes: parameters of the 1-D and the 2-D model, and tensors of the 1-D one.
PUBLISHED = {
    "GPT-B": (111_085_824, 110_888_448, 89),
    "GPT-L": (343_174_144, 342_910_976, 173),
    "GPT-XL": (775_028_480, 774_699_520, 257),
    "GPT-XXL": (1_411_367_424, 1_410_972_672, 341),
    "GPT-XXXL": (3_893_685_760, 3_893_027_840, 341),
    "GPT-1B": (1_200_142_336, 1_199_616_000, 159),
    "GPT-3B": (3_097_481_600, 3_096_659_200, 173),
    "GPT-7B": (6_615_642_112, 6_614_589_440, 229),
}
VARIANTS = [
    {}, {"qk_norm": True}, {"positions": "rope_2d"}, {"conditioning": "adaln"}, {"conditioning": "simple_adaln"},
    {"positions": "rope_2d", "conditioning": "adaln", "qk_norm": True},
    {"positions": "rope_2d", "conditioning": "simple_adaln"},
]


def count(config):
    return sum(parameter.numel() for parameter in build_on_meta(config).parameters())


@pytest.mark.parametrize("size", GPT_SIZES)
def test_sizes_are_the_published_ones(size):
    one, two, tensors = PUBLISHED[size]
    assert count(GPTConfig(size=size)) == one and len(build_on_meta(GPTConfig(size=size)).state_dict()) == tensors
    grid = build_on_meta(GPTConfig(size=size, positions="rope_2d"))
    assert sum(parameter.numel() for parameter in grid.parameters()) == two
    assert len(grid.state_dict()) == tensors - 1 and "positional_embedding" not in grid.state_dict()


def test_sizes_with_adaptive_layer_norm_are_the_published_ones():
    assert count(GPTConfig(size="GPT-B", conditioning="adaln", qk_norm=True)) == 154_792_704
    assert count(GPTConfig(size="GPT-B", conditioning="simple_adaln")) == 115_865_856


def test_names_and_shapes_are_the_originals():
    width = 32
    shapes, plain, shared = (
        {name: tuple(value.shape) for name, value in build_on_meta(config).state_dict().items()}
        for config in (small_gpt_config(conditioning="adaln"), small_gpt_config(),
                       small_gpt_config(conditioning="simple_adaln")))
    final = {"final_adaLN.1.weight": (2 * width, width), "final_adaLN.1.bias": (2 * width,)}
    of_layers = {f"layers.{i}.adaLN_modulation.1.{name}": shape for i in range(2)
                 for name, shape in (("weight", (6 * width, width)), ("bias", (6 * width,)))}
    assert shapes == plain | final | of_layers
    assert shared == plain | final | {
        "adaLN.1.weight": (6 * width, width), "adaLN.1.bias": (6 * width,),
        **{f"layers.{i}.ada_gss": (1, 1, 6, width) for i in range(2)}}


@pytest.mark.parametrize("changes", VARIANTS[2:], ids=str)
def test_originals_of_the_variants_are_read_and_written(changes):
    config = sized(changes)
    weights = opinionated(config).float().state_dict()
    _, again = from_original(config, to_original(config, weights), "x.pt")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    with pytest.raises(InputError, match=r"x.pt"):
        from_original(small_gpt_config(sequence_length=9), weights, "x.pt")


def sized(changes, **more):
    """Three layers, heads of eight features, and a grid of nine cells."""
    size = TransformerSize(width=32, layers=3, heads=4)
    return small_gpt_config(size=size, sequence_length=9, **changes, **more)


def opinionated(config):
    """A GPT in float64 none of whose weights is zero."""
    gpt = initialise_(GPT(config), seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return gpt


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x, token, grid=3):
    """One head's query or key (head_dim,) at one token, pair by pair as the formula says; token 0 is the class."""
    if token == 0:
        return torch.zeros_like(x)
    half, out = len(x) // 2, torch.empty_like(x)
    for pair in range(half):
        along = divmod(token - 1, grid)[0 if pair < half // 2 else 1]
        angle = along * 10000 ** (-2 * (pair % (half // 2)) / half)
        out[2 * pair] = x[2 * pair] * math.cos(angle) - x[2 * pair + 1] * math.sin(angle)
        out[2 * pair + 1] = x[2 * pair + 1] * math.cos(angle) + x[2 * pair] * math.sin(angle)
    return out


def plain_logits(config, weights, codes, label):
    """Logits (t + 1, vocab) of one sequence: a plain reading of the description, head by head."""
    w = weights
    x = torch.stack([w["cls_embedding.embedding_table.weight"][label], *w["tok_embeddings.weight"][codes]])
    if config.positions == "learned":
        x = x + w["positional_embedding"][: len(x)]
    condition = F.silu(x[0])

    def modulation(name):
        return (w[f"{name}.1.weight"] @ condition + w[f"{name}.1.bias"]).view(-1, 32)

    for i in range(3):
        shift_a = scale_a = shift_m = scale_m = torch.zeros(32, dtype=torch.float64)
        gate_a = gate_m = torch.ones(32, dtype=torch.float64)
        if config.conditioning == "adaln":
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(f"layers.{i}.adaLN_modulation")
        elif config.conditioning == "simple_adaln":
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation("adaLN") + w[f"layers.{i}.ada_gss"][0, 0]
        y = rms_norm(x, w[f"layers.{i}.attention_norm.weight"]) * (1 + scale_a) + shift_a
        q, k, v = (y @ part.t() for part in w[f"layers.{i}.attention.wqkv.weight"].view(3, 32, 32))
        heads = []
        for head in range(4):
            q_h, k_h, v_h = (part[:, 8 * head : 8 * head + 8] for part in (q, k, v))
            if config.qk_norm:
                q_h, k_h = (F.layer_norm(part, (8,), w[f"layers.{i}.attention.{name}_norm.weight"],
                                         w[f"layers.{i}.attention.{name}_norm.bias"])
                            for name, part in (("q", q_h), ("k", k_h)))
            if config.positions == "rope_2d":
                q_h, k_h = (torch.stack([turned(row, token) for token, row in enumerate(part)]) for part in (q_h, k_h))
            scores = q_h @ k_h.t() / 8**0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            heads.append(scores.softmax(-1) @ v_h)
        x = x + gate_a * (torch.cat(heads, -1) @ w[f"layers.{i}.attention.wo.weight"].t())
        y = rms_norm(x, w[f"layers.{i}.ffn_norm.weight"]) * (1 + scale_m) + shift_m
        w1, w2, w3 = (w[f"layers.{i}.feed_forward.w{number}.weight"] for number in (1, 2, 3))
        x = x + gate_m * ((F.silu(y @ w1.t()) * (y @ w3.t())) @ w2.t())
    x = rms_norm(x, w["norm.weight"])
    if config.conditioning != "prefix":
        shift, scale = modulation("final_adaLN")
        x = x * (1 + scale) + shift
    return x @ w["output.weight"].t()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_are_those_of_a_plain_reading(changes):
    """To 1e-6 of the largest logit: norms and rotations are float32 in ours, everything else is float64."""
    config = sized(changes)
    gpt = opinionated(config)
    codes, classes = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1)), torch.tensor([3, 5])
    with torch.no_grad():
        logits = gpt(codes, classes)
    for row in range(2):
        expected = plain_logits(config, gpt.state_dict(), codes[row], int(classes[row]))
        assert ((logits[row] - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_decoding_is_teacher_forcing(changes):
    gpt = opinionated(sized(changes))
    codes, classes = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = gpt(codes[:, :-1], classes)
        decoder = EagerDecoder(gpt)
        for position, tokens in enumerate([classes, *codes.t()[:-1]]):
            logits = decoder.step(tokens, position)
            assert ((logits - expected[:, position]).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize("changes", VARIANTS[2:], ids=str)
def test_greedy_samples_are_those_of_recomputation_and_leave_the_model_clean(changes):
    """The original's 2-D model was fed the class at every step, and wrote one code over and over."""
    gpt = opinionated(sized(changes))
    classes, keys = torch.tensor([0, 3, 4]), set(gpt.state_dict())
    cached = generate(gpt, classes, top_k=1)
    codes = torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(9):
            codes = torch.cat([codes, gpt(codes, classes)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, codes) and set(gpt.state_dict()) == keys
    assert all(len(row.unique()) > 1 for row in cached)


@pytest.mark.parametrize("conditioning", ["adaln", "simple_adaln"])
def test_a_new_model_starts_where_the_original_does(conditioning):
    config = small_gpt_config(size=TransformerSize(width=128, layers=2, heads=2), conditioning=conditioning)
    gpt = initialise_(GPT(config), seed=0)
    parameters = dict(gpt.named_parameters())
    projections = [name for name in parameters if "adaLN" in name]
    assert len(projections) == {"adaln": 6, "simple_adaln": 4}[conditioning]
    assert all(parameters[name].abs().max() == 0 for name in projections)
    if conditioning == "simple_adaln":
        assert parameters["layers.1.ada_gss"].std().item() == pytest.approx(128**-0.5, rel=0.1)
    codes = torch.arange(16).view(2, 8)
    assert gpt(codes[:, :-1], torch.tensor([0, 1]), codes).mean().item() == pytest.approx(math.log(64), abs=1e-6)


def test_paths_are_dropped_for_whole_samples_and_more_often_further_up():
    gpt = GPT(small_gpt_config(size=TransformerSize(width=32, layers=5, heads=4), drop_path=0.4))
    paths = [path for block in gpt.layers for path in (block.attention_path, block.ffn_path)]
    rates = [getattr(path, "probability", 0.0) for path in paths]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    path = DropPath(0.25)
    name_dropouts(path)
    samples = torch.arange(4000)
    with dropout_at(7, samples):
        out = path(torch.ones(3, 4000, 5))
    assert (out == out[:1, :, :1]).all(), "a sample is kept or dropped as a whole"
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs((out[0, :, 0] == 0).double().mean().item() - 0.25) < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    with dropout_at(7, samples[100:200]):
        assert torch.equal(path(torch.ones(3, 100, 5)), out[:, 100:200]), "wherever the sample is computed"
    assert torch.equal(path.eval()(torch.ones(3, 4, 5)), torch.ones(3, 4, 5))


def test_a_path_that_is_never_dropped_is_no_path():
    """So that the dropouts of models without it keep their numbers, and their masks."""
    assert not any(isinstance(module, DropPath) for module in GPT(small_gpt_config()).modules())


@pytest.mark.parametrize("changes, words", [
    ({"positions": "rope_2d"}, "sequence_length is 8; positions rope_2d needs a square number.* such as 4 or 9"),
    ({"positions": "rope_2d", "sequence_length": 9, "size": TransformerSize(width=12, layers=1, heads=2)},
     "heads of 6"),
    ({"drop_path": 1.0}, "drop_path is 1.0"),
    ({"drop_path": 0.1, "size": TransformerSize(width=32, layers=1, heads=2)}, "does nothing in a model of one layer"),
])
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        small_gpt_config(**changes)
