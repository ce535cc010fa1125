"""Learning rates of parts and layers: which parameter has which, what they do, on every layout, and what is refused."""

import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences
from rank_runs import run_ranks
from small_models import small_gpt, small_tokenizer
from torch import nn

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.engine.depth import TRANSFORMERS, layers_to_last
from gigatok_ds.engine.optimizers import parameter_groups, rate_factors
from gigatok_ds.errors import InputError

# What is behind the last layer of a transformer.
BEHIND = {"gpt": ("norm.", "output.", "final_adaLN."),
          "tokenizer": ("encoder.ln_post.", "encoder.conv_out.", "quant_conv.", "quantizer.", "decoder.ln_post.",
                        "decoder.conv_out.", "decoder.distill_mlp.", "cnn_decoder.")}
RATES = ["optimizer.layerwise_lr=0.5", "optimizer.part_lr={output: 2.0, tok_embeddings: 0.25}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("layouts"))


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def models():
    for changes in ({}, {"positions": "rope_2d"}, {"conditioning": "adaln"}, {"conditioning": "simple_adaln"}):
        yield "gpt", small_gpt(sequence_length=16, **changes)
    for changes in ({}, {"layout": "2d", "latent_tokens": 64}, {"latent_query": "learned", "grid_query": "learned"}):
        yield "tokenizer", small_tokenizer(**changes)


def test_every_parameter_is_before_in_or_behind_the_layers():
    for kind, model in models():
        for name in names_of(model):
            places = [name.startswith(BEHIND[kind]), *(name.startswith(transformer.layers) for transformer in
                                                       TRANSFORMERS), *(name.startswith(transformer.before)
                                                                        for transformer in TRANSFORMERS)]
            assert sum(places) == 1, (kind, name)
        assert {name.partition(".")[0] for name, count in layers_to_last(names_of(model)).items()
                if count} == set(model.config.before_last_layer)


def test_layers_are_counted_from_the_last_of_their_transformer():
    assert layers_to_last(["tok_embeddings.weight", "layers.0.w", "layers.2.w", "layers.11.w", "norm.weight"]) == {
        "tok_embeddings.weight": 12, "layers.0.w": 11, "layers.2.w": 9, "layers.11.w": 0, "norm.weight": 0}
    found = layers_to_last(["cnn_encoder.w", "encoder.transformer.0.w", "encoder.transformer.1.w", "quant_conv.weight",
                            "post_quant_conv.weight", "decoder.transformer.0.w", "cnn_decoder.w"])
    assert list(found.values()) == [2, 1, 0, 0, 1, 0, 0]


def test_factors_of_parts_and_layers_multiply():
    model = small_gpt()
    factors = rate_factors(model, OptimizerConfig(layerwise_lr=0.5, part_lr={"layers": 3.0, "output": 0.1}))
    depth = len(model.layers)
    for name, factor in factors.items():
        part, number = [*name.split("."), ""][:2]
        expected = {"layers": 3.0 * 0.5 ** (depth - 1 - int(number)) if part == "layers" else 0, "output": 0.1,
                    "norm": 1.0}.get(part, 0.5**depth)
        assert factor == pytest.approx(expected), name


def test_without_them_there_are_the_two_groups_there_were():
    groups = parameter_groups(small_gpt(), OptimizerConfig(decay="matrices"))
    assert [(group["weight_decay"], group["lr_factor"]) for group in groups] == [(1e-4, 1.0), (0.0, 1.0)]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.norm = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        for layer in (*self.layers, self.norm):
            x = layer(x)
        return x


def first_update(stage):
    """How far AdamW's first update moves each parameter: its rate, where gradients are far above epsilon."""
    from gigatok_ds.engine.engine import Engine
    from gigatok_ds.parallel.topology import start_process_group

    settings = zero_settings(stage) | {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "steps_per_print": 10**9, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
    torch.manual_seed(0)
    config = OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0, eps=1e-12, layerwise_lr=0.5, part_lr={"norm": 3.0})
    engine = Engine(Two, config, settings, topology=start_process_group())
    before = {name: part.values.clone() for name, part in engine._state.fragments().items()}
    engine.backward(engine(torch.randn(4, 4)).sum())
    engine.step(1e-2)
    return {name: float((part.values - before[name]).abs().median())
            for name, part in engine._state.fragments().items()}


@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_update_has_the_rate_of_its_group(stage):
    (moved,) = run_ranks(first_update, 1, stage)
    assert moved == pytest.approx({"layers.0.weight": 5e-3, "layers.1.weight": 1e-2, "norm.weight": 3e-2}, rel=1e-4)


@pytest.mark.parametrize("layout", [Layout(tensor=2, data=1, stage=1),
                                    pytest.param(Layout(tensor=2, data=2, stage=3), marks=pytest.mark.slow)], ids=str)
def test_layouts_train_like_a_single_process(runs, layout):
    alone = runs.result("gpt", Layout(), *RATES)
    assert max(largest_differences(runs.result("gpt", layout, *RATES), alone)) < 1e-5


@pytest.mark.slow
def test_a_tokenizers_layouts_do_so_too(runs):
    rates = ["optimizer.layerwise_lr=0.8", "optimizer.part_lr={cnn_decoder: 0.5}"]
    alone = runs.result("tokenizer", Layout(), *rates)
    assert max(largest_differences(runs.result("tokenizer", Layout(data=2, stage=2), *rates), alone)) < 1e-5


@pytest.mark.parametrize(("kind", "settings", "said"), [
    ("gpt", ["optimizer.part_lr={encoder: 0.1}"], "part_lr has 'encoder'; parts of this model are cls_embedding"),
    ("gpt", ["optimizer.part_lr={norm: 0.1}", "training.freeze=[norm]"], "has norm, which is not trained"),
    ("gpt", ["optimizer.part_lr={norm: 0.1}", "training.lora={rank: 2, alpha: 2.0}"], "has norm, which is not trained"),
    ("gpt", ["optimizer.part_lr={norm: -1.0}"], "part_lr.norm is -1.0; it must be a number above 0"),
    ("gpt", ["optimizer.part_lr={norm: 0.0}"], "training.freeze leaves a part as it is"),
    ("gpt", ["optimizer.part_lr={norm: .inf}"], "part_lr.norm is inf"),
    ("gpt", ["optimizer.layerwise_lr=0"], "layerwise_lr is 0.0; it must be above 0 and at most 1"),
    ("gpt", ["optimizer.layerwise_lr=1.5"], "layerwise_lr is 1.5"),
    ("gpt", ["optimizer.layerwise_lr=0.9", "model.size={width: 32, layers: 1, heads: 4}",
             "training.freeze=[cls_embedding, tok_embeddings, positional_embedding]"], "so it does nothing"),
    ("tokenizer", ["optimizer.layerwise_lr=0.9", "training.freeze=[cnn_encoder, encoder, post_quant_conv, decoder]"],
     "so it does nothing"),
])
def test_what_would_do_nothing_is_refused(runs, kind, settings, said):
    with pytest.raises(InputError, match=said):
        runs.recipe(kind, Layout(), *settings)


def test_the_discriminator_has_no_rates_of_parts():
    config = OptimizerConfig(layerwise_lr=0.5, part_lr={"decoder": 2.0}, lr=3e-4)
    assert config.of_discriminator == OptimizerConfig(lr=3e-4)
