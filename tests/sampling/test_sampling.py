"""Fast sampling: an image's codes do not depend on its company, and guidance is what plain recomputation gives."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_runs import run_ranks
from small_models import small_gpt, small_gpt_config

from gigatok_ds import InputError, generate
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.config.model import TransformerSize
from gigatok_ds.cpu.few_row_product import has_few_row_product
from gigatok_ds.cpu.hugepages import large_empty
from gigatok_ds.cpu.packed_gpt import HAS_ONEDNN, OneDNNLinear, PanelLinear, can_pack, packed
from gigatok_ds.sampling.generate import EagerDecoder, Sampler
from gigatok_ds.sampling.guidance import guidance_scales
from gigatok_ds.sampling.logits import Choice, choose_codes, uniform_numbers

# Wide enough that a plain matrix product gives other bits for other numbers of rows.
WIDE = {"size": TransformerSize(width=192, layers=2, heads=4), "vocab_size": 512, "sequence_length": 12}
CLASSES = torch.arange(15) % 5
GUIDED = {"cfg_scale": 2.0, "cfg_schedule": "linear", "temperature": 0.9, "top_k": 300, "top_p": 0.98}


def in_batches(gpt, size, *, numbers=range(15), **settings):
    """Codes of the images `numbers`, `size` at a time."""
    sampler = Sampler(gpt, size)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return torch.cat([sampler.codes(CLASSES[list(part)], part, seed=3, **settings) for part in parts])


@pytest.fixture(params=[PanelLinear, OneDNNLinear])
def kernels(request, monkeypatch):
    """What multiplies: our kernel, or oneDNN where there is none."""
    monkeypatch.setenv("GIGATOK_KERNELS", "torch" if request.param is OneDNNLinear else "auto")
    if request.param is PanelLinear and not has_few_row_product(torch.ones(1)):
        pytest.skip("no native kernel, or no AVX-512")
    if request.param is OneDNNLinear and not HAS_ONEDNN:
        pytest.skip("no oneDNN whose products of a few rows agree for any number of them")
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [{}, GUIDED, GUIDED | {"cfg_interval": 4}])
def test_an_images_codes_do_not_depend_on_its_company(threads, kernels, settings):
    gpt = small_gpt(**WIDE)
    threads(1)
    alone = in_batches(gpt, 1, **settings)
    assert len(torch.unique(alone, dim=0)) == 15
    for count, size in ((1, 2), (1, 7), (2, 7), (2, 15), (2, 1)):
        threads(count)
        assert torch.equal(in_batches(gpt, size, **settings), alone)
    assert torch.equal(in_batches(gpt, 4, numbers=range(14, 3, -1), **settings), alone[4:].flip(0))
    assert torch.equal(generate(gpt, CLASSES[5:9], images=range(5, 9), seed=3, **settings), alone[5:9])


def test_logits_are_the_same_bits_for_any_number_of_rows_and_threads(threads, kernels):
    gpt = small_gpt(**WIDE)
    assert can_pack(gpt)
    fast, tokens = EagerDecoder(packed(gpt)), torch.arange(33) % 5
    assert isinstance(fast.gpt.output, kernels)

    def logits(rows):
        with torch.no_grad():
            return torch.stack([fast.step(tokens[:rows], position)[:2] for position in range(12)])

    threads(1)
    two = logits(2)
    for count in (1, 2):
        threads(count)
        for rows in (3, 4, 7, 8, 14, 16, 33):
            assert torch.equal(logits(rows), two), (count, rows)


@torch.no_grad()
def recomputed(gpt, classes, scales):
    """Greedy codes in float64 without a cache: the whole sequence anew for each code, both halves always."""
    gpt = gpt.double()
    nobody = torch.full_like(classes, gpt.unconditional_class)
    codes = torch.empty(len(classes), 0, dtype=torch.long)
    for scale in scales:
        conditional, unconditional = gpt(codes, classes)[:, -1], gpt(codes, nobody)[:, -1]
        mixed = unconditional + (conditional - unconditional) * scale if scale > 1 else conditional
        codes = torch.cat([codes, mixed.argmax(-1)[:, None]], dim=1)
    return codes


@pytest.mark.parametrize("interval", [-1, 0, 5])
@pytest.mark.parametrize("schedule, kwargs", [
    ("constant", {}), ("linear", {}), ("linear_re", {}), ("triangular", {"peak": 0.3}), ("cosine", {}),
    ("rectangular", {"window_start": 0.3, "window_end": 0.7}), ("step", {"window_start": 0.4}),
])
def test_every_schedule_gives_what_recomputation_gives(schedule, kwargs, interval):
    guidance = {"cfg_scale": 3.0, "cfg_schedule": schedule, "cfg_schedule_kwargs": kwargs, "cfg_interval": interval}
    scales = guidance_scales(12, 3.0, schedule, kwargs, interval)
    if interval >= 0:
        # Decoding steps are counted from 0 after the first code, as the original does.
        assert scales[interval + 2 :] == [1.0] * (10 - interval) and min(scales[: interval + 2]) > 1
    codes = generate(small_gpt(**WIDE, qk_norm=True), CLASSES[:7], top_k=1, **guidance)
    assert torch.equal(codes, recomputed(small_gpt(**WIDE, qk_norm=True), CLASSES[:7], scales))


def test_guidance_runs_the_unconditional_half_only_while_it_is_used():
    gpt, rows = small_gpt(**WIDE), []
    sampler = Sampler(gpt, 3)
    step = sampler.decoder.step
    sampler.decoder.step = lambda tokens, position: rows.append(len(tokens)) or step(tokens, position)
    sampler.codes(CLASSES[:3], range(3), cfg_scale=2.0, cfg_interval=4)
    sampler.codes(CLASSES[:3], range(3), cfg_scale=1.0, cfg_schedule="linear")
    assert rows == [6] * 6 + [3] * 6 + [3] * 12


def test_draws_follow_the_distribution_and_nothing_else():
    logits = torch.tensor([[2.0, float("-inf"), 0.0, 1.0, float("-inf")]]).expand(4000, 5)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = choose_codes(logits, uniform, Choice())
    shares = torch.bincount(drawn, minlength=5) / 4000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=2 / 4000)
    assert torch.equal(drawn, drawn.sort().values)
    extremes = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose_codes(logits[:2], extremes, Choice()).tolist() == [0, 3]
    first, all_ = uniform_numbers(7, [5], 3), uniform_numbers(7, range(9), 20)
    assert torch.equal(first[0], all_[5, :3]) and len(all_.unique()) == 9 * 20


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_codes(tmp_path):
    gpt = small_gpt(**WIDE)
    sampler, settings = Sampler(gpt, 7, compile=True), {"cfg_scale": 2.0, "cfg_interval": 6}
    eager = generate(gpt, CLASSES[:7], top_k=1, **settings)
    drawn = sampler.codes(CLASSES[:7], range(7), **settings)
    assert torch.equal(sampler.codes(CLASSES[:7], range(7), top_k=1, **settings), eager)
    for size in (1, 2):
        assert torch.equal(sampler.codes(CLASSES[:size], range(size), **settings), drawn[:size])


def codes_of_a_tensor_rank(path, size):
    from gigatok_ds.checkpoint.standalone import load_gpt_part
    from gigatok_ds.parallel.topology import start_process_group

    topology = start_process_group(tensor_size=size)
    gpt = load_gpt_part(path, topology)
    sampler = Sampler(gpt, 4)
    codes = [sampler.codes(CLASSES[:4], range(4), cfg_scale=2.0, top_k=k, cfg_interval=7) for k in (1, 0)]
    return [gpt.layers[0].attention.wqkv.weight.shape[0], sampler.decoder.caches[0].keys.shape[1], *codes]


def test_two_tensor_ranks_draw_the_codes_of_one(tmp_path):
    gpt = small_gpt(**WIDE, qk_norm=True)
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict())
    (rows, heads, *full), = run_ranks(codes_of_a_tensor_rank, 1, tmp_path / "gpt", 1)
    assert (rows, heads) == (3 * 192, 4)
    for half_rows, half_heads, *codes in run_ranks(codes_of_a_tensor_rank, 2, tmp_path / "gpt", 2):
        assert (half_rows, half_heads) == (3 * 96, 2)
        assert torch.equal(codes[0], full[0]) and torch.equal(codes[1], full[1])


def test_what_cannot_be_sampled_is_refused(tmp_path):
    gpt = small_gpt()
    with pytest.raises(InputError, match="2 classes and 1 image numbers"):
        generate(gpt, torch.tensor([0, 1]), images=[4])
    with pytest.raises(InputError, match="cfg_interval is -2"):
        generate(gpt, torch.tensor([0]), cfg_scale=2.0, cfg_interval=-2)
    assert generate(gpt, torch.empty(0, dtype=torch.long)).shape == (0, small_gpt_config().sequence_length)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages on request")
def test_large_memory_asks_for_large_pages():
    tensor = large_empty((5, 2**20), torch.empty(0))
    assert tensor.shape == (5, 2**20) and tensor.dtype == torch.float32
    middle, flags = tensor.data_ptr() + 2**22, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
        elif line.startswith("VmFlags:") and start <= middle < end:
            flags = line.split()
    assert "hg" in flags
    assert large_empty((3,), torch.empty(0)).shape == (3,)
