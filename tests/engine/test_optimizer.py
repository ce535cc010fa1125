"""The optimizers and their groups, and at which rates generator and discriminator step."""

import pytest
import torch
from layout_runs import Layout, LayoutRuns, train_on_a_rank
from rank_runs import run_ranks
from saved_runs import read_everything
from torch import nn
from training_runs import partitioning, prepare

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.engine.optimizers import build_optimizer, parameter_groups
from gigatok_ds.training.schedules import scheduled_lr


def small_network():
    network = nn.ModuleDict({"norm_in": nn.LayerNorm(3), "linear": nn.Linear(3, 2)})
    network["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    return network


@pytest.mark.parametrize("decay, decayed", [
    ("everything", {"norm_in.weight", "norm_in.bias", "linear.weight", "linear.bias"}),
    ("matrices", {"linear.weight"}),
    ("not_norms", {"linear.weight", "linear.bias"}),
])
def test_decay_touches_what_it_says(decay, decayed):
    network = small_network()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, OptimizerConfig(decay=decay, weight_decay=0.1))
    found = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    expected = {name: 0.1 if name in decayed else 0.0 for name in names.values() if not name.startswith("frozen")}
    assert found == expected


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_two_steps_are_those_of_the_published_formulas(kind):
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2; in float64 to 1e-12."""
    torch.manual_seed(0)
    config = OptimizerConfig(kind=kind, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, decay="matrices")
    network = small_network().double()
    weight, bias = network["linear"].weight, network["linear"].bias
    optimizer = build_optimizer(network, config)
    expected = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in expected.items()}
    for t in (1, 2):
        for name, parameter in (("weight", weight), ("bias", bias)):
            x, g, decay = expected[name], torch.randn_like(parameter), 0.1 if name == "weight" else 0.0
            parameter.grad = g.clone()
            if kind == "adam":
                g = g + decay * x
            else:
                x = x - 0.01 * decay * x
            first, second = moments[name]
            first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g.square()
            moments[name] = first, second
            expected[name] = x - 0.01 * (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-6)
        optimizer.step()
    for name, parameter in (("weight", weight), ("bias", bias)):
        assert (parameter - expected[name]).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_weights_and_moments_are_those_of_torchs_plain_loop(kind, dtype, allowed):
    """Relative to their norm, after ten updates of which one is left out, clipped by a factor of two on the way."""
    config = OptimizerConfig(kind=kind, lr=0.01, weight_decay=0.1, decay="matrices")
    networks = [small_network().to(dtype) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = build_optimizer(networks[0], config)
    plain = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind](
        parameter_groups(networks[1], config), lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)
    torch.manual_seed(0)
    ours.grad_scale = torch.tensor(2.0)
    for update in range(11):
        ours.found_inf = torch.tensor(float(update == 5))
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            if one.requires_grad:
                other.grad = torch.randn_like(other)
                one.grad = 2 * other.grad if update != 5 else torch.full_like(one, torch.nan)
        ours.step()
        if update != 5:
            plain.step()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        for mine, theirs in [(one, other), *((ours.state[one][name], plain.state[other][name])
                                             for name in ("step", "exp_avg", "exp_avg_sq") if one.requires_grad)]:
            assert (mine - theirs).norm() <= allowed * theirs.norm()


def train_and_note_rates(recipe, out):
    from gigatok_ds.training import tokenizer_task
    from gigatok_ds.training.run import run_training

    rates = {}

    class NotingEngine(tokenizer_task.Engine):
        def step(self, lr, left_out=None):
            rates.setdefault(type(self.network).__name__, []).append(lr)
            super().step(lr, left_out)

    tokenizer_task.Engine = NotingEngine
    run_training(recipe, out, zero_settings(1))
    return rates


def test_the_discriminator_first_steps_at_the_base_rate_and_then_follows(tmp_path):
    """Like the original, which schedules its rate only after a step of its own."""
    data = prepare(tmp_path)
    recipe = load_recipe(tmp_path / "tokenizer.yaml",
                         ["training.steps=6", "schedule.warmup_steps=6", *data["tokenizer"]])
    (rates,) = run_ranks(train_and_note_rates, 1, recipe, tmp_path / "run")
    base = recipe.optimizer.lr
    scheduled = [scheduled_lr(recipe.schedule, base, 6, step) for step in range(6)]
    assert recipe.loss.adversarial.start_step == 4
    assert rates == {"Tokenizer": [base, *scheduled[:5]], "PatchGAN": [base, *scheduled[3:5]]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("updates"))


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
@pytest.mark.parametrize("kind", ["adamw", pytest.param("adam", marks=pytest.mark.slow)])
def test_in_half_precision_every_stage_makes_as_many_updates_as_there_are_steps(runs, kind, stage, tmp_path):
    """At stage 0 DeepSpeed makes one without gradients while it is built, which must change and count nothing."""
    recipe = runs.recipe("gpt", Layout(), "training.precision=bf16", "training.steps=2", "checkpoint.every=2",
                         "training.validate_every=2", f"optimizer.kind={kind}", "optimizer.weight_decay=0.3",
                         "optimizer.max_grad_norm=0")
    found = {}
    for number in (1, stage):
        run_ranks(train_on_a_rank, 1, recipe, tmp_path / str(number), partitioning(number))
        found[number] = read_everything(tmp_path / str(number) / "checkpoints/step-0000002/gpt")
    (expected, _), (tensors, updates) = found[1], found[stage]
    assert set(updates.values()) == {2}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tensors.items())
