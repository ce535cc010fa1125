"""GPT-B against vectors made by running the original, and cached decoding against recomputation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import arrays, golden_model
from small_models import small_gpt, small_gpt_config

from gigatok_ds import InputError, generate
from gigatok_ds.config.load import load_recipe
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.sampling.generate import Sampler
from gigatok_ds.sampling.guidance import guidance_scales
from gigatok_ds.sampling.logits import keep_top_k, keep_top_p


@pytest.fixture(scope="module")
def gpt_b():
    return golden_model(load_recipe("GPT-B").model)


@pytest.fixture(scope="module")
def golden():
    return arrays("ar_GPT-B")


def test_logits_loss_and_inner_features(gpt_b, golden):
    codes, classes = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["classes"])
    with torch.no_grad():
        logits = gpt_b(codes[:, :-1], classes)
        inner = gpt_b.hidden_states(codes[:, :-1], classes, depth=6).transpose(0, 1)
    np.testing.assert_allclose(logits[:, ::32, ::512].numpy(), golden["logits"], atol=1e-4)
    np.testing.assert_allclose(inner[:, ::32, ::16].numpy(), golden["inner_feature_half_depth"], atol=1e-4)
    assert F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() == pytest.approx(float(golden["loss"]),
                                                                                          abs=1e-5)


GREEDY = {
    "greedy_nocfg": {},
    "greedy_constant4": {"cfg_scale": 4.0},
    "greedy_step1.75": {"cfg_scale": 1.75, "cfg_schedule": "step", "cfg_schedule_kwargs": {"window_start": 0.18}},
    "greedy_linear3": {"cfg_scale": 3.0, "cfg_schedule": "linear"},
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("key, batch", [
    ("greedy_step1.75", 2),  # with guidance at some positions, and next to none at others
    *(pytest.param(key, batch, marks=SLOW) for key in GREEDY for batch in (1, 2, 7)
      if (key, batch) != ("greedy_step1.75", 2)),
])
def test_greedy_sequences_are_the_originals(gpt_b, golden, key, batch):
    rows = np.arange(batch) % 2
    codes = generate(gpt_b, torch.from_numpy(golden["classes"][rows]), top_k=1, **GREEDY[key])
    assert codes.dtype == torch.int64
    assert (codes.numpy() == golden[key][rows]).all()


@pytest.mark.slow
def test_greedy_sequences_are_the_originals_when_compiled(gpt_b, golden):
    sampler = Sampler(gpt_b, 7, compile=True)
    for key, guidance in GREEDY.items():
        for batch in (1, 2, 7):
            rows = np.arange(batch) % 2
            codes = sampler.codes(torch.from_numpy(golden["classes"][rows]), range(batch), top_k=1, **guidance)
            assert (codes.numpy() == golden[key][rows]).all(), (key, batch)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_decoding_equals_recomputation_and_leaves_the_model_clean(qk_norm):
    gpt = small_gpt(qk_norm=qk_norm)
    classes = torch.tensor([0, 3, 4])
    keys = set(gpt.state_dict())
    cached = generate(gpt, classes, top_k=1)
    codes = torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(8):
            codes = torch.cat([codes, gpt(codes, classes)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, codes)
    assert set(gpt.state_dict()) == keys


def test_a_seed_repeats_itself_and_matters():
    gpt = small_gpt()
    classes = torch.arange(5)
    first, again, other = (generate(gpt, classes, cfg_scale=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_first_loss_of_a_new_gpt_is_the_logarithm_of_the_vocabulary():
    gpt = initialise_(GPT(small_gpt_config()), seed=0)
    logits = gpt(torch.zeros(2, 7, dtype=torch.long), torch.tensor([0, 1]))
    assert F.cross_entropy(logits.flatten(0, 1), torch.arange(16)).item() == pytest.approx(np.log(64), abs=1e-6)


def test_filters_keep_what_they_promise():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0]])
    assert torch.isfinite(keep_top_k(logits, 2)).tolist() == [[True, True, True, False], [False, True, True, False]]
    # Row 0 has probabilities .53 .20 .20 .07: one code reaches 0.5, the second is needed to pass 0.6.
    assert torch.isfinite(keep_top_p(logits, 0.5)).sum(1).tolist() == [1, 1]
    assert torch.isfinite(keep_top_p(logits, 0.6)).sum(1).tolist() == [2, 1]
    assert torch.isfinite(keep_top_p(logits, 1e-6)).sum(1).tolist() == [1, 1]


def test_schedules_at_known_points():
    assert guidance_scales(5, 3.0, "linear") == pytest.approx([3.0, 1.5001, 2.0001, 2.5001, 3.0001])
    assert guidance_scales(5, 3.0, "linear_re") == pytest.approx([3.0, 2.5001, 2.0001, 1.5001, 1.0001])
    assert guidance_scales(5, 3.0, "triangular") == pytest.approx([3.0, 2.0001, 3.0001, 2.0001, 1.0001])
    assert guidance_scales(5, 3.0, "rectangular", {"window_end": 0.5}) == pytest.approx([3.0, 3.0, 3.0, 1.0001, 1.0001])
    assert guidance_scales(5, 3.0, "cosine") == pytest.approx([3.0, 1 + 0.5 * 2 * (1 + np.cos(np.pi / 4)), 2.0,
                                                              1 + 0.5 * 2 * (1 + np.cos(np.pi * 0.75)), 1.0])
    step = guidance_scales(256, 1.75, "step", {"window_start": 0.18})
    assert step[0] == 1.75 and set(step[1:46]) == {1.0001} and set(step[46:]) == {1.75}
    assert guidance_scales(5, 1.0, "linear") == [1.0] * 5


@pytest.mark.parametrize("arguments, words", [
    ({"cfg_scale": 0.5}, "at least 1"),
    ({"cfg_scale": 2.0, "cfg_schedule": "sigmoid"}, "choose one of constant"),
    ({"cfg_scale": 2.0, "cfg_schedule": "step"}, "window_start"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"temperature": -1.0}, "temperature"),
])
def test_arguments_out_of_range_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        generate(small_gpt(), torch.tensor([0]), **arguments)


def test_classes_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"classes must be in \[0, 5\); got 6 to 6"):
        generate(small_gpt(), torch.tensor([6]))
