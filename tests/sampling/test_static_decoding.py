"""A decoding step as a GPU replays it: the same operations on the same tensors, whatever the position and the data."""

import pytest
import torch
from small_models import small_gpt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gigatok_ds import generate
from gigatok_ds.config.model import GPTConfig, TransformerSize
from gigatok_ds.models.gpt import GPT
from gigatok_ds.sampling import cache
from gigatok_ds.sampling.generate import Sampler
from gigatok_ds.sampling.logits import Choice
from gigatok_ds.sampling.static import StaticDecoder

WIDE = {"size": TransformerSize(width=192, layers=2, heads=4), "vocab_size": 512, "sequence_length": 12}
CLASSES = torch.arange(7) % 5
aten = torch.ops.aten
# What makes the host wait for the device, or a shape depend on data.
FORBIDDEN = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_consecutive, aten.equal,
             aten.is_nonzero, aten.repeat_interleave}


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on any device: it records operations and their tensors, and runs them again without the
    Python code in between."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in FORBIDDEN:
            raise AssertionError(f"{function} in a decoding step")
        if function.overloadpacket in (aten.index, aten.index_put_):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "a boolean index"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def launches(self):
        """Operations that compute something: views are none."""
        return sum(not any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
                   and function.overloadpacket != aten._unsafe_view for function, *_ in self.calls)

    def replay(self):
        made = {}
        for function, args, kwargs, result in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), (args, kwargs))
            again = function(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old is not new:
                    made[id(old)] = new


def tensors(result):
    return [part for part in (result if isinstance(result, (tuple, list)) else [result])
            if isinstance(part, torch.Tensor)]


class Taped(StaticDecoder):
    """Replays as on a GPU, from tapes that were recorded at the first position of their kind."""

    def advance(self, *, guided):
        key = guided, self.choice
        if key not in self.captured:
            begun = [tensor.clone() for tensor in (self.position, self.chosen)]
            with Tape() as tape:
                self.step(guided)
            self.position.copy_(begun[0])
            self.chosen.copy_(begun[1])
            self.captured[key] = tape.replay
        self.captured[key]()


def drawn(gpt, *, decoder=Taped, batch=7, **settings):
    sampler = Sampler(gpt, batch)
    sampler.decoder, sampler.fewest = decoder(gpt, batch), batch
    return sampler


SETTINGS = [{"top_k": 1}, {}, {"cfg_scale": 2.0, "top_k": 1}, {"cfg_scale": 2.0, "cfg_interval": 5, "temperature": 0.9},
            {"cfg_scale": 3.0, "cfg_schedule": "cosine", "top_k": 40, "top_p": 0.9},
            {"cfg_scale": 3.0, "cfg_schedule": "step", "cfg_schedule_kwargs": {"window_start": 0.4}, "top_p": 0.5}]


@pytest.mark.parametrize("variant", [{}, {"conditioning": "adaln", "positions": "learned"}, {"qk_norm": True}])
def test_a_replayed_step_draws_what_generate_draws(variant):
    gpt = small_gpt(**WIDE, **variant)
    sampler = drawn(gpt)
    for settings in SETTINGS * 2:  # the second time nothing is recorded
        expected = generate(gpt, CLASSES, seed=3, **settings)
        assert torch.equal(sampler.codes(CLASSES, range(7), seed=3, **settings), expected)
        part = sampler.codes(CLASSES[2:4], [2, 3], seed=3, **settings)
        assert torch.equal(part, expected[2:4])
    assert len(sampler.decoder.captured) == 2 * len(SETTINGS) - 4


def test_addresses_stay_and_nothing_else_is_kept():
    sampler = drawn(small_gpt(**WIDE))
    decoder = sampler.decoder
    sampler.codes(CLASSES, range(7), cfg_scale=2.0)
    kept = [decoder.chosen, decoder.codes, decoder.uniform, decoder.scales, decoder.position, decoder.slots.bias,
            *(tensor for cache in decoder.caches for tensor in (cache.keys, cache.values))]
    before = [tensor.data_ptr() for tensor in kept]
    first = sampler.codes(CLASSES, range(7), cfg_scale=2.0, seed=1)
    sampler.codes(CLASSES.flip(0), range(7), cfg_scale=4.0, seed=2)
    assert torch.equal(sampler.codes(CLASSES, range(7), cfg_scale=2.0, seed=1), first)
    assert before == [tensor.data_ptr() for tensor in kept]


@pytest.mark.parametrize("size, layers", [("GPT-B", 12), ("GPT-XXL", 48)])
@torch.no_grad()
def test_a_step_needs_no_data(monkeypatch, size, layers):
    """On tensors without storage. Its graph is one launch, of as many kernels as docs/sample.md says."""
    # One operation on a GPU, but several of a tensor without storage.
    monkeypatch.setattr(cache.F, "scaled_dot_product_attention", lambda query, *_, attn_mask: query.clone())
    with torch.device("meta"):
        decoder = StaticDecoder(GPT(GPTConfig(size=size)).eval(), 32)
        classes, uniform = torch.zeros(32, dtype=torch.long), torch.empty(32, 256, dtype=torch.float64)
    decoder.begin(classes, uniform, [2.0] * 256, Choice())
    for guided, other in ((True, 36), (False, 29)):
        with Tape() as tape:
            decoder.step(guided)
        assert tape.launches() == 24 * layers + other
