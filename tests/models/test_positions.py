"""Positions for other sizes: what stays, what is interpolated, and that a model goes on from there."""

import pytest
import torch

from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.models.positions import level_shape, resizable, resize


def table(count, width=4, seed=0):
    return torch.randn(count, 1, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how, count", [("grid", 256), ("levels", 64), ("linear", 10)])
def test_the_same_size_is_the_same_table(how, count):
    assert torch.allclose(resize(table(count), count, how).table, table(count), atol=1e-6)


@pytest.mark.parametrize("before, after", [(16, 32), (16, 8), (4, 24), (3, 7)])
def test_a_grid_is_resized_as_an_image(before, after):
    """A plane stays a plane, but for its edges, and rows are not mixed up with columns."""
    rows, columns = torch.meshgrid(torch.arange(before) + 0.5, torch.arange(before) + 0.5, indexing="ij")
    plane = torch.stack([rows, columns], dim=-1).flatten(0, 1)[:, None] / before
    found = resize(plane, after**2, "grid")
    assert found.how == f"{before} x {before} positions become {after} x {after}, bicubically"
    grid = found.table.reshape(after, after, 2)
    rows, columns = torch.meshgrid(torch.arange(after) + 0.5, torch.arange(after) + 0.5, indexing="ij")
    inner = slice(after // 4, after - after // 4)
    expected = torch.stack([rows, columns], dim=-1) / after
    assert torch.allclose(grid[inner, inner], expected[inner, inner], atol=0.05)


def test_levels_stay_and_finer_ones_come_of_the_last():
    before = table(16)
    found = resize(before, 64, "levels")
    assert torch.equal(found.table[:16], before) and "finer levels are interpolated" in found.how
    last = before[8:].reshape(2, 4, 4)  # the finest level of 16 tokens: 8 cells
    assert level_shape(4) == (2, 4) and level_shape(5) == (4, 4) and level_shape(6) == (4, 8)
    for start, shape in ((16, (4, 4)), (32, (4, 8))):
        finer = found.table[start : start * 2].reshape(*shape, 4).permute(2, 0, 1)
        coarse = torch.nn.functional.adaptive_avg_pool2d(finer, (2, 4)).permute(1, 2, 0)
        assert torch.corrcoef(torch.stack([coarse.flatten(), last.flatten()]))[0, 1] > 0.95
    fewer = resize(found.table, 8, "levels")
    assert torch.equal(fewer.table, before[:8]) and "left out" in fewer.how


def test_tokens_without_levels_are_resized_in_a_line():
    ramp = torch.arange(10.0)[:, None, None].expand(10, 1, 2)
    found = resize(ramp, 20, "linear")
    assert torch.allclose(found.table[1:-1, 0, 0], torch.arange(20.0)[1:-1] / 2 - 0.25)
    assert resize(ramp, 20, "levels").how == "10 latent tokens become 20, linearly"  # no powers of two


def test_the_class_of_a_gpt_keeps_its_row_and_its_type():
    before = torch.randn(17, 8).bfloat16()
    found = resize(before, 65, "levels", keep=1)
    assert found.table.shape == (65, 8) and found.table.dtype == torch.bfloat16
    assert torch.equal(found.table[:17], before)


def test_what_is_no_grid_is_left_to_whoever_asks():
    assert resize(table(15), 16, "grid") is None and resize(table(16), 15, "grid") is None


def test_which_tables_there_are():
    of = {name: dict(resizable(load_recipe(*words).model)) for name, words in {
        "1d": ("VQ_SS256",), "2d": ("VQ_SS256_2d",), "learned": ("VQ_SS256", ["model.latent_query=learned"]),
        "gpt": ("GPT-B",), "rope": ("GPT-B", ["model.positions=rope_2d"])}.items()}
    assert set(of["2d"].values()) == {"grid"} and "levels" in of["1d"].values() and of["rope"] == {}
    assert "linear" in of["learned"].values() and of["gpt"] == {"positional_embedding": "levels"}


@pytest.mark.parametrize("size, tokens, next_ones", [
    (384, 256, "next are 128, or image_size 256 or 512"), (128, 256, "next are 128, or image_size 256"),
    (256, 100, "next are 64 and 128$"), (256, 1024, "next are 512, or image_size 512"),
    (192, 256, "next are 32, or image_size 256"),
])
def test_sizes_that_levels_do_not_divide(size, tokens, next_ones):
    with pytest.raises(InputError, match=next_ones):
        load_recipe("VQ_SS256", [f"model.image_size={size}", f"model.latent_tokens={tokens}"])


@pytest.mark.parametrize("size, tokens", [(384, 128), (128, 128), (512, 256), (512, 1024), (384, 64)])
def test_other_sizes_run(size, tokens):
    from gigatok_ds.models.tokenizer import Tokenizer

    small = ["model.encoder={width: 32, layers: 1, heads: 2}", "model.decoder={width: 32, layers: 1, heads: 2}",
             "model.semantic_head=null", "loss.semantic=null", f"model.image_size={size}",
             f"model.latent_tokens={tokens}"]
    config = load_recipe("VQ_SS256", small).model
    with torch.device("meta"):
        output = Tokenizer(config)(torch.empty(1, 3, size, size))
    assert output.reconstruction.shape == (1, 3, size, size) and output.codes.shape[-1] == tokens
