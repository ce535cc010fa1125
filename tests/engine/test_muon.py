"""Muon: torch's and the published formula, which parameters it takes, every layout, checkpoints, and refusals."""

import shutil

import pytest
import torch
from layout_runs import PARTS, Layout, LayoutRuns, largest_differences, train_on_a_rank
from rank_runs import run_ranks
from small_models import small_gpt, small_tokenizer
from torch import nn
from training_runs import partitioning

from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.dry_run.dry_run_result import PackedMatrix
from gigatok_ds.engine.muon import Muon, orthogonalized
from gigatok_ds.engine.optimizers import build_optimizer, hidden_matrices
from gigatok_ds.engine.spread_matrices import MatrixShare, SpreadMatrix
from gigatok_ds.engine.zero_stages import Place
from gigatok_ds.errors import InputError
from gigatok_ds.parallel.sharding import TensorShard
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.planning.cluster import parse_cluster
from gigatok_ds.planning.plan_cache import matrices
from gigatok_ds.planning.planner import PlannedLayout, Planner
from gigatok_ds.planning.speed import Assumptions
from gigatok_ds.planning.state import state_of

MUON = "optimizer.kind=muon"
CONFIG = OptimizerConfig(kind="muon", lr=0.01, weight_decay=0.1, decay="matrices", betas=(0.8, 0.9), momentum=0.9)
ALWAYS = [("gpt", Layout(tensor=2, data=2, stage=3)), ("gpt", Layout(tensor=2, data=1, stage=1))]
SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]
ALL = [(kind, Layout(tensor=tensor, data=data, stage=stage))
       for kind in PARTS for tensor, data in SHAPES for stage in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("layouts"))


class Small(nn.Module):
    """A packed projection of three matrices, a wide and a tall one, and what is AdamW's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(5, 9, bias=False), nn.Linear(6, 4), nn.Linear(3, 7, bias=False)])
        self.layers[0].shards = {"weight": TensorShard(groups=3)}
        self.norm = nn.LayerNorm(4)


def alone(network, optimizer):
    """The optimizer told where its matrices are when one process holds everything."""
    rounds, holders = [], []
    for name in sorted(hidden_matrices(network, CONFIG)):
        parameter = network.get_parameter(name)
        owner = network.get_submodule(name.rpartition(".")[0])
        place, everything = Place(parameter, 0, 0, parameter.numel()), (0, parameter.numel())
        rounds.append([SpreadMatrix(shape=tuple(parameter.shape), cut=getattr(owner, "shards", {}).get("weight"),
                                    gives=place, takes=place, shares=[MatrixShare(0, everything, everything)])])
        holders.append(parameter)
    optimizer.spread({id(holder): rounds for holder in holders}, single_process())
    return optimizer


def updates(network, steps=6, left_out=3, dtype=torch.float32):
    """(name, gradients by name, whether it is left out) of each update."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        yield {name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
               for name, parameter in network.named_parameters()}, step == left_out


def by_singular_values(matrix):
    """The published polynomial, applied five times to the singular values of matrix / its norm."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_updates_are_those_of_the_formula_in_float64():
    """An update that is left out, whose gradients are not finite, changes nothing; all others are scaled by two."""
    network = Small().double()
    adamw = {"lr": CONFIG.lr, "betas": CONFIG.betas, "eps": CONFIG.eps}
    groups = build_optimizer(network, CONFIG).param_groups
    optimizer = alone(network, Muon([{key: group[key] for key in ("params", "weight_decay", "lr_factor", "hidden")}
                                     for group in groups], momentum=0.9, dtype=torch.float64, **adamw))
    expected = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    optimizer.grad_scale = torch.tensor(2.0)
    for gradients, left_out in updates(network, dtype=torch.float64):
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        for name, parameter in network.named_parameters():
            parameter.grad = torch.full_like(parameter, torch.nan) if left_out else 2 * gradients[name]
        optimizer.found_inf = torch.ones(()) if left_out else None
        optimizer.step()
        if left_out:
            assert all(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())
            continue
        for name in hidden_matrices(network, CONFIG):
            momenta[name] = 0.9 * momenta[name] + 0.1 * gradients[name]
            direction = 0.1 * gradients[name] + 0.9 * momenta[name]
            parts = direction.chunk(3) if name == "layers.0.weight" else [direction]
            scale = 0.2 * max(parts[0].shape) ** 0.5
            step = torch.cat([by_singular_values(part) for part in parts])
            expected[name] = (1 - 0.01 * 0.1) * expected[name] - 0.01 * scale * step
    for name in hidden_matrices(network, CONFIG):
        assert (network.get_parameter(name) - expected[name]).abs().max() < 1e-12, name
    states = [optimizer.state[network.get_parameter(name)] for name in hidden_matrices(network, CONFIG)]
    assert all(state.keys() == {"step", "exp_avg"} and state["step"] == 5 for state in states)


@pytest.mark.parametrize("told", [False, True])
def test_updates_are_those_of_torchs_muon(told):
    """In bfloat16, in which torch's orthogonalizes; told: whether `found_inf` says that updates count."""
    ours, theirs = Small(), Small()
    ours.layers[0].shards = {}  # torch's knows no packed matrices
    optimizer = alone(ours, build_optimizer(ours, CONFIG, half=True))
    optimizer.found_inf = torch.zeros(()) if told else None
    hidden = hidden_matrices(theirs, CONFIG)
    reference = torch.optim.Muon([theirs.get_parameter(name) for name in sorted(hidden)], lr=0.01, weight_decay=0.1,
                                 momentum=0.9, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([{"params": [parameter for name, parameter in theirs.named_parameters()
                                          if name not in hidden], "weight_decay": 0.0}], lr=0.01, betas=(0.8, 0.9))
    for gradients, _ in updates(ours):
        for network in (ours, theirs):
            for name, parameter in network.named_parameters():
                parameter.grad = gradients[name].clone()
        optimizer.step()
        reference.step()
        rest.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_singular_values_come_near_to_one_and_nothing_stays_nothing(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape) * 1e-3))
    assert values.min() > 0.3 and values.max() < 1.25
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_its_operations_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((8, 24), (24, 8), (16, 16)):
        with FlopCounterMode(display=False) as counter:
            orthogonalized(torch.randn(shape))
        matrix = PackedMatrix(elements=0, rows=shape[0], columns=shape[1], packed=1)
        assert counter.get_total_flops() == matrix.flops


def test_it_takes_the_matrices_of_transformer_layers():
    attention = {"attention.wqkv.weight", "attention.wo.weight"}
    for changes in ({}, {"conditioning": "adaln"}, {"conditioning": "simple_adaln"}):
        gpt = small_gpt(sequence_length=16, **changes)
        found = {name.split(".", 2)[2] for name in hidden_matrices(gpt, CONFIG)}
        assert found == attention | {f"feed_forward.w{number}.weight" for number in (1, 2, 3)}
        assert all(name.startswith("layers.") for name in hidden_matrices(gpt, CONFIG))
    for changes in ({}, {"layout": "2d", "latent_tokens": 64}):
        tokenizer = small_tokenizer(**changes)
        found = hidden_matrices(tokenizer, CONFIG)
        assert {name.split(".transformer.")[0] for name in found} == {"encoder", "decoder"}
        assert {name.split(".", 3)[3] for name in found} == {
            *(f"{which}.{name}_proj.weight" for which in ("self_attn", "multihead_attn") for name in "qkv"),
            "self_attn.out_proj.weight", "multihead_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert hidden_matrices(gpt, OptimizerConfig()) == set()


@pytest.mark.parametrize(("kind", "layout"), ALWAYS, ids=str)
def test_some_layouts_train_like_a_single_process(runs, kind, layout):
    assert max(largest_differences(runs.result(kind, layout, MUON), runs.result(kind, Layout(), MUON))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [case for case in ALL if case not in ALWAYS], ids=str)
def test_every_layout_trains_like_a_single_process(runs, kind, layout):
    assert max(largest_differences(runs.result(kind, layout, MUON), runs.result(kind, Layout(), MUON))) < 1e-5


@pytest.mark.parametrize("layout", [
    Layout(tensor=2, data=1, stage=2, sequence=True, accumulate=True),
    pytest.param(Layout(tensor=2, data=2, stage=0), marks=pytest.mark.slow)], ids=str)
def test_with_rates_of_layers_and_ranks_compared_they_do_so_too(runs, layout):
    """Ranks that should hold the same weights, momenta and averages are compared after each step."""
    more = [MUON, "optimizer.layerwise_lr=0.6", "optimizer.part_lr={layers: 0.5}", "training.ema_decay=0.5",
            "faults.compare_every=1"]
    assert max(largest_differences(runs.result("gpt", layout, *more), runs.result("gpt", Layout(), *more))) < 1e-5


def test_it_trains_otherwise_than_adamw(runs):
    """Otherwise layouts could agree because nothing of it is used."""
    (metrics, ours), (_, theirs) = (runs.result("gpt", Layout(), *more) for more in ([MUON], []))
    moved = {name for name, value in ours.items() if value.dim() == 2 and name.startswith("layers.")
             and (value - theirs[name]).norm() > 0.05 * theirs[name].norm()}
    assert moved == hidden_matrices(small_gpt(), CONFIG)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]


def train(recipe, out, layout):
    run_ranks(train_on_a_rank, layout.tensor * layout.data, recipe, out, partitioning(layout.stage), timeout=900)


@pytest.mark.parametrize(("kind", "layout", "other"), [
    ("gpt", Layout(tensor=2, data=1, stage=1), Layout(tensor=1, data=2, stage=3)),
    pytest.param("gpt", Layout(tensor=1, data=2, stage=3), Layout(tensor=2, data=2, stage=0), marks=pytest.mark.slow),
    pytest.param("gpt", Layout(tensor=2, data=2, stage=0), Layout(tensor=1, data=2, stage=2), marks=pytest.mark.slow),
    pytest.param("tokenizer", Layout(tensor=2, data=2, stage=3), Layout(stage=1), marks=pytest.mark.slow),
], ids=str)
def test_a_checkpoint_goes_on_at_another_layout(runs, tmp_path, kind, layout, other):
    """A matrix has one moment there, everything else two, of the discriminator all."""
    more = [MUON, "training.steps=6", "checkpoint.every=3", "training.validate_every=6", "training.ema_decay=0.5"]
    train(runs.recipe(kind, layout, *more), tmp_path / "full", layout)
    resumed = shutil.copytree(tmp_path / "full", tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/step-0000006")
    train(runs.recipe(kind, other, *more), resumed, other)
    for folder in (tmp_path / "full/checkpoints/step-0000006").glob("*/engine.json"):
        one, two = (SavedEngine(run / "checkpoints/step-0000006" / folder.parent.name)
                    for run in (tmp_path / "full", resumed))
        recipe = runs.recipe(kind, Layout(), *more)
        model = {"gpt": small_gpt, "generator": small_tokenizer}.get(folder.parent.name)
        assert one.layout.adam_steps == two.layout.adam_steps
        for name in one.layout.parameters:
            for what in ("weights", "exp_avg", "exp_avg_sq", *(["ema"] if model else [])):
                if what == "exp_avg_sq" and model and is_hidden(recipe, name):
                    with pytest.raises(InputError, match=r"of exp_avg_sq of .* are missing"):
                        two.read(what, name)
                    continue
                mine, theirs = two.read(what, name), one.read(what, name)
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=0.01), (what, name)


def is_hidden(recipe, name):
    from gigatok_ds.checkpoint.original import build_on_meta

    return name in hidden_matrices(build_on_meta(recipe.model), recipe.optimizer)


@pytest.mark.parametrize(("kind", "settings", "said"), [
    ("gpt", [MUON, "training.precision=fp16"], "optimizer.kind is muon, but training.precision is fp16"),
    ("gpt", [MUON, "training.freeze=[layers]"], "training.freeze has layers, so there are no matrices for it"),
    ("tokenizer", [MUON, "training.freeze=[encoder, decoder]"], "has encoder, decoder, so there are no matrices"),
    ("gpt", [MUON, "training.lora={rank: 2, alpha: 2.0}"], "with training.lora the matrices of layers stay"),
    ("gpt", ["optimizer.momentum=0.9"], "momentum is 0.9, but it does nothing with optimizer.kind adamw"),
    ("gpt", [MUON, "optimizer.momentum=1.0"], "momentum is 1.0; it must be at least 0 and below 1"),
])
def test_what_could_not_be_right_is_refused(runs, kind, settings, said):
    with pytest.raises(InputError, match=said):
        runs.recipe(kind, Layout(), *settings)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_offload_is_refused(runs, section):
    recipe = runs.recipe("gpt", Layout(), MUON)
    settings = zero_settings(3)
    settings["zero_optimization"][section] = {"device": "cpu"}
    with pytest.raises(InputError, match=f"{section} keeps in host memory what optimizer.kind muon puts together"):
        resolve_deepspeed(settings, recipe, data_parallel_size=1)
    settings["zero_optimization"][section] = {"device": "none"}
    resolve_deepspeed(settings, recipe, data_parallel_size=1)


def test_the_discriminator_stays_adamws():
    assert CONFIG.of_discriminator == OptimizerConfig(lr=0.01, weight_decay=0.1, decay="matrices", betas=(0.8, 0.9))


def test_plans_count_one_moment_and_the_exchange(runs):
    """Of every rank that is put together: the matrices of small_gpt's two layers, of which tensor ranks have halves."""
    found = {}
    for kind, tensor in (("adamw", 1), ("muon", 1), ("muon", 2)):
        recipe = runs.recipe("gpt", Layout(tensor=tensor), f"optimizer.kind={kind}")
        found[kind, tensor] = matrices(recipe)
    whole, halves = found["muon", 1], found["muon", 2]
    width, hidden = 32, 256
    assert not found["adamw", 1].matrices and len(whole.matrices) == 2 * 5
    assert whole.elements == 2 * (4 * width * width + 3 * width * hidden) == 2 * halves.elements
    assert whole.largest == halves.largest == width * hidden and whole.flops(1) == halves.flops(1)
    assert whole.flops(10) == whole.matrices[0].flops
    assert whole.sent(stage=2, data_ranks=4, half=True) == whole.elements
    states = [state_of([whole.elements, 100], zero={"stage": 2}, data_ranks=2, precision="bf16", average=False,
                       muon=muon) for muon in (found["adamw", 1], whole)]
    assert states[0].moments - states[1].moments == 4 * whole.elements / 2
    assert states[1].update - states[0].update == 8 * 2 * whole.largest


def test_plans_of_it_take_less_memory_and_more_time():
    plans = [Planner(load_recipe("GPT-B", ["training.precision=bf16", *settings]), parse_cluster("1x2xH100"),
                     Assumptions()).plan(
        PlannedLayout(tensor=1, sequence=False, stage=2, micro=8, recompute="nothing")) for settings in ([], [MUON])]
    assert plans[1].memory.states["gpt"].moments < 0.7 * plans[0].memory.states["gpt"].moments
    assert plans[1].time.update > plans[0].time.update and plans[1].traffic.matrices > 0 == plans[0].traffic.matrices
