"""The meter: operations whose FLOPs and bytes are known by hand, eager and compiled, their floor, and the reports made
of them.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmark_scripts import loaded
from torch import nn
from training_runs import GPT, TOKENIZER

import gigatok_ds
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.dry_run import source_lines
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.compiled import block_of, passes_of, signature_of
from gigatok_ds.dry_run.dry_run import Rehearsal
from gigatok_ds.dry_run.floor import Floor
from gigatok_ds.dry_run.meter import Meter
from gigatok_ds.dry_run.update_bytes import bucket_bytes, update_bytes
from gigatok_ds.dry_run.work import Operation, Rates, Work, from_rows
from gigatok_ds.errors import InputError
from gigatok_ds.kernels.ops import code_histogram
from gigatok_ds.models.gpt import RMSNorm
from gigatok_ds.planning.cluster import parse_cluster
from gigatok_ds.planning.devices import DEVICES, parse_gpu_spec
from gigatok_ds.planning.planner import PlannedLayout
from gigatok_ds.planning.roofline import roofline
from gigatok_ds.planning.speed import Assumptions

ROWS, IN, OUT = 64, 32, 48
X, W, Y = ROWS * IN * 4, IN * OUT * 4, ROWS * OUT * 4  # bytes in float32
PACKAGE = Path(gigatok_ds.__file__).parent


def meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def measured(run, *parameters, floor=None):
    """{operator: (group, calls, bytes read, bytes written, FLOPs)} of `run`, whose parameters were there before."""
    with Meter(floor) as meter:
        meter.ignore(parameters)
        run()
    found = {}
    for operation, calls in meter.calls.items():
        before = found.get(operation.name, (operation.group, 0, 0, 0, 0))
        more = (calls, calls * operation.read, calls * operation.written, calls * operation.flops)
        found[operation.name] = (operation.group, *(a + b for a, b in zip(before[1:], more, strict=True)))
    return found


def test_a_linear_layer_and_silu():
    x, weight, gradient = meta(ROWS, IN, requires_grad=True), meta(OUT, IN, requires_grad=True), meta(ROWS, OUT)
    product = 2 * ROWS * IN * OUT

    def run():
        F.silu(F.linear(x, weight)).backward(gradient)

    assert measured(run, x, weight, gradient) == {
        "mm": ("matrix", 3, (X + W) + (Y + X) + (Y + W), Y + W + X, 3 * product),
        "silu": ("pointwise", 1, Y, Y, 0), "silu_backward": ("pointwise", 1, 2 * Y, Y, 0)}


def test_norms_residuals_and_what_only_names_memory():
    x, weight, bias = meta(ROWS, IN), meta(IN), meta(IN)
    found = measured(lambda: F.layer_norm(x, (IN,), weight, bias))
    assert found == {"native_layer_norm": ("norm", 1, X + 2 * IN * 4, X + 2 * ROWS * 4, 0)}
    # A group is more than a multiprocessor holds, so its statistics are read for first.
    maps = meta(2, 32, 8, 8)
    found = measured(lambda: F.group_norm(maps, 4))
    assert found["native_group_norm"] == ("norm", 1, 2 * maps.nbytes, maps.nbytes + 2 * 2 * 4 * 4, 0)
    assert measured(lambda: (x + x, x.t().reshape(-1, ROWS)[:4].detach())) == {"add": ("pointwise", 1, 2 * X, X, 0)}
    assert measured(lambda: x.add_(x)) == {"add_": ("pointwise", 1, 2 * X, X, 0)}
    assert measured(lambda: x.copy_(meta(IN).expand(ROWS, IN)))["copy_"] == ("copies", 1, IN * 4, X, 0)
    table, rows = meta(1000, IN), torch.zeros(ROWS, dtype=torch.int64, device="meta")
    assert measured(lambda: F.embedding(rows, table))["embedding"][2:4] == (X + ROWS * 8, X), "the rows that are picked"


def test_operators_of_ours_without_an_entry_count_what_goes_in_and_out():
    codes = torch.zeros(500, dtype=torch.int64, device="meta")
    assert measured(lambda: code_histogram(codes, 100)) == {"gigatok::code_histogram": ("quantizer", 1, 4000, 800, 0)}


def test_the_floor_of_two_layers():
    """Between the products: forward SiLU reads y and writes a; backward it reads y and a's gradient and writes y's.
    What its inside needs is neither written nor read: the sigmoid of SiLU, taken apart."""
    x, first, second = meta(ROWS, IN), meta(OUT, IN, requires_grad=True), meta(IN, OUT, requires_grad=True)
    gradient, floor = meta(ROWS, IN), Floor()

    def run():
        y = F.linear(x, first)
        F.linear(y * torch.sigmoid(y), second).backward(gradient)

    eager = measured(run, x, first, second, gradient, floor=floor)
    products = (X + W + Y) + (Y + W + X) + (X + W + Y) + (X + Y + W) + (Y + X + W)
    assert sum(operation.read + operation.written for operation in floor.products) == products
    assert floor.bytes_between == (Y + Y) + (Y + Y + Y)
    assert sum(read + written
               for group, _, read, written, _ in eager.values() if group != "matrix") > 2 * floor.bytes_between
    rates = Rates(products={"fp32": 1e12, "half": 1e12}, bandwidth=1e6, launch=1.0)
    assert floor.seconds(rates) == pytest.approx((products + 5 * Y) / 1e6)


class Residual(nn.Module):
    """x + silu(W x)"""

    recompute_unit = "block"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, IN, bias=False)

    def forward(self, x):
        return x + F.silu(self.linear(x))


def compiled(module, *arguments):
    block = block_of(module, module.forward, arguments, {})
    return passes_of(signature_of(block), block)


def kernels(work):
    return sorted((operation.group, operation.read, operation.written, operation.flops, calls)
                  for operation, calls in work.calls.items())


def test_a_compiled_block_is_what_inductor_fuses():
    """Forward: the product, and one kernel that reads it and x. Backward: one kernel from the gradient and the product
    to the product's gradient, and two products, of which that for x adds the gradient that comes around it."""
    with torch.device("meta"):
        module = Residual()
    found = compiled(module, meta(ROWS, IN, requires_grad=True))
    weight, product = IN * IN * 4, 2 * ROWS * IN * IN
    assert kernels(found.forward) == [("matrix", X + weight, X, product, 1), ("pointwise", 2 * X, X, 0, 1)]
    assert kernels(found.backward) == [("matrix", 2 * X, weight, product, 1), ("matrix", 2 * X + weight, X, product, 1),
                                       ("pointwise", 2 * X, X, 0, 1)]


def test_a_compiled_norm_reads_its_input_once():
    with torch.device("meta"):
        module = RMSNorm(IN, 1e-5)
    found = compiled(module, meta(ROWS, IN, requires_grad=True))
    (group, read, written, _, calls), = kernels(found.forward)
    assert (group, calls) == ("norm", 1)
    assert read == X + IN * 4 and written == X + ROWS * 4, "x and the weight; the result, and a factor of each row"
    assert sum(op.source.startswith("models/gpt.py:") for op in found.forward.calls) == 1


WITHOUT_DROPOUT = ("model.residual_dropout=0", "model.token_dropout=0")


def recipe_of(folder, *overrides):
    (folder / "gpt.yaml").write_text(GPT)
    return load_recipe(folder / "gpt.yaml",
                       ["model.size={width: 64, layers: 5, heads: 2}", "training.precision=bf16", *overrides])


def test_compiled_blocks_compute_what_eager_ones_do_and_move_less(tmp_path):
    recipe = recipe_of(tmp_path, *WITHOUT_DROPOUT)
    eager, fused = (rehearse(recipe, 8, 1, compiled=compiled) for compiled in (False, True))
    assert (eager.flops, eager.kept, eager.sent) == (fused.flops, fused.kept, fused.sent)
    total, smaller = (work.shared(lambda operation: "")[""] for work in (eager.work, fused.work))
    assert total.flops == smaller.flops == eager.flops
    assert smaller.bytes < 0.7 * total.bytes and smaller.calls < 0.5 * total.calls
    assert fused == Rehearsal(recipe, compiled=True).micro_batch(8, 1)
    again = rehearse(recipe_of(tmp_path, *WITHOUT_DROPOUT, "parallel.recompute_every=1"), 8, 1, compiled=True)
    # Eager layers stop where nothing more is needed: before the product with w2, whose result nobody keeps.
    more = 5 * 2 * 8 * recipe.model.sequence_length * recipe.model.transformer.width * recipe.model.ffn_width
    assert again.work.shared(lambda operation: "")[""].flops == again.flops + more > fused.flops


@pytest.mark.slow
@pytest.mark.parametrize("kind, overrides",
                         [("gpt", ["parallel.tensor=2", "parallel.sequence=true"]), ("tokenizer", [])])
def test_compiled_blocks_of_tensor_ranks_and_of_tokenizers(tmp_path, kind, overrides):
    (tmp_path / "recipe.yaml").write_text({"gpt": GPT, "tokenizer": TOKENIZER}[kind])
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.precision=bf16", *overrides])
    eager, fused = (Rehearsal(recipe, compiled=compiled).micro_batch(8, 4) for compiled in (False, True))
    assert eager[:-1] == fused[:-1]
    total, smaller = (work.shared(lambda operation: "")[""] for work in (eager.work, fused.work))
    assert total.flops == smaller.flops and smaller.bytes < 0.7 * total.bytes and smaller.calls < 0.5 * total.calls


def test_work_adds_up_and_survives_a_file(tmp_path):
    work = rehearse(recipe_of(tmp_path), 8, 1).work
    rates = Assumptions().rates(DEVICES["H100"])
    assert sum(share.seconds for share
               in work.shared(lambda op: op.group, rates).values()) == pytest.approx(work.seconds(rates))
    assert work.starting(rates) > 0 == work.starting(rates._replace(launch=0.0))
    kept = from_rows(json.loads(json.dumps(work.rows())))
    assert kept.seconds(rates) == pytest.approx(work.seconds(rates)) and kept.bytes == work.bytes
    assert (work + work - work) == work and 3 * work == work + work + work
    doubled = work.of_samples(2)
    assert doubled.bytes == 2 * work.bytes and doubled.seconds(rates) < 2 * work.seconds(rates)


def test_an_operation_takes_the_longest_of_three():
    rates = Rates(products={"half": 100.0, "tf32": 50.0, "fp32": 10.0}, bandwidth=1000.0, launch=0.5)
    each = [Operation("matrix", "", "", kind, read, 0, flops) for kind, read, flops in
            (("half", 0, 200), ("tf32", 0, 200), ("fp32", 0, 200), ("half", 3000, 200), ("half", 10, 1))]
    assert [rates.seconds(operation) for operation in each] == [2.0, 4.0, 20.0, 3.0, 0.5]
    assert Work({each[0]: 2, each[4]: 1}).seconds(rates) == 4.5


def test_lines_of_a_report_are_those_of_the_source(tmp_path):
    recipe = recipe_of(tmp_path, "training.global_batch_size=16")
    layout = PlannedLayout(tensor=1, sequence=False, stage=1, micro=8, recompute="nothing")
    found = roofline(recipe, layout, 1, cluster=parse_cluster("1x2xH100"), assumptions=Assumptions())
    assert 0 < found.mfu < found.floor_mfu < 1
    assert sum(share.seconds for share in found.groups().values()) == pytest.approx(found.plan.time.seconds)
    assert {"matrix", "attention", "norm", "pointwise", "optimizer", "communication"} <= found.groups().keys()
    offenders = found.offenders()
    assert len(offenders) == 5 and [one.lost for one in offenders] == sorted((one.lost for one in offenders),
                                                                             reverse=True)
    for one in offenders:
        file, _, line = one.source.partition(":")
        assert (PACKAGE / file).read_text().splitlines()[int(line) - 1].strip()
    again = roofline(recipe, PlannedLayout(tensor=1, sequence=False, stage=1, micro=8, recompute="transformer blocks"),
                     1, cluster=parse_cluster("1x2xH100"), assumptions=Assumptions())
    assert again.model == found.model and again.plan.micro.flops > found.plan.micro.flops


def test_contexts_name_code_that_is_there():
    for file, name, group in source_lines._CONTEXTS:
        module = importlib.import_module("gigatok_ds." + file.removesuffix(".py").replace("/", "."))
        part = module
        for attribute in filter(None, name.split(".")):
            part = getattr(part, attribute)
        assert group in ("quantizer", "frozen networks")


def test_frozen_networks_and_the_quantizer_are_told_apart(tmp_path):
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    recipe = load_recipe(tmp_path / "tokenizer.yaml", ["training.precision=bf16", "loss.perceptual={weight: 1.0}"])
    groups = rehearse(recipe, 8, step=4).work.shared(lambda operation: operation.group)
    assert {"convolution", "attention", "matrix", "norm", "frozen networks", "quantizer", "copies"} <= groups.keys()
    assert groups["frozen networks"].flops > 0, "VGG16, forward and backward"


def test_bytes_of_an_update():
    assert update_bytes(half=False, partitioned=False, average=False)["Adam"] == 28
    half, plain = (sum(update_bytes(half=half, partitioned=half, average=half).values()) for half in (True, False))
    assert (half, plain) == (2 + 10 + 10 + 8 + 28 + 6 + 12, 4 + 4 + 8 + 28)
    assert (bucket_bytes(half=True, partitioned=True), bucket_bytes(half=True, partitioned=False)) == (4, 0)


SPEC = "X1:memory_gb=96,bandwidth_gbs=1792,bf16_tflops=500,tf32_tflops=250,fp32_tflops=125"


def test_a_gpu_that_someone_describes(capsys):
    device = parse_gpu_spec(SPEC)
    assert (device.memory, device.memory_bandwidth, device.link) == (96e9, 1.792e12, 32e9)
    assert device.peaks == {"half": 5e14, "tf32": 2.5e14, "fp32": 1.25e14} and device.is_gpu
    assert parse_cluster("2x4xX1", described=device).device == device
    assert main(["plan", "GPT-B", "--cluster", "1x4xX1", "--gpu-spec", SPEC]) == 0
    assert "GPT-B on 1x4xX1" in capsys.readouterr().out


@pytest.mark.parametrize("text, said", [
    ("X1", "write NAME:memory_gb=N"), (SPEC.replace("X1", "H100"), "is known already"),
    (SPEC + ",colour=3", "no figure of a GPU"),
    (SPEC + ",tf32_tflops=3", "given twice"), (SPEC.replace("=96", "=-1"), "memory_gb=-1; it must be a number above 0"),
    (SPEC.replace("=96", "=lots"), "memory_gb=lots; it must be"),
    ("X1:memory_gb=80", "bandwidth_gbs, bf16_tflops, tf32_tflops, "),
    ("1x:memory_gb=3", "write NAME"), (SPEC.replace("=96", "=inf"), "memory_gb=inf"),
])
def test_gpus_that_are_none(text, said):
    with pytest.raises(InputError, match=said):
        parse_gpu_spec(text)


@pytest.mark.parametrize("arguments, said", [
    ([], "name a recipe, or give --all"), (["GPT-B", "--all"], "name a recipe, or give --all"),
    (["GPT-B", "--micro", "0"], "--micro is 0"),
    (["GPT-B", "--gpu", "V100"], "'V100' is not known"), (["GPT-B", "--step", "99999999"], "ends at 1,500,000"),
    (["GPT-Z"], "GPT-Z"),
])
def test_what_the_benchmark_refuses(arguments, said, capsys):
    with loaded("gpu_roofline") as benchmark:
        assert benchmark.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_benchmark_reports_and_hands_on_figures(tmp_path, capsys):
    recipe = recipe_of(tmp_path)
    (tmp_path / "gpt.yaml").write_text(GPT)
    with loaded("gpu_roofline") as benchmark:
        code = benchmark.main([str(tmp_path / "gpt.yaml"), "--micro", "8", "--gpu", "RTX4090", "--captured", "--json",
                               str(tmp_path / "figures.json"), "model.size={width: 64, layers: 2, heads: 2}"])
        told = capsys.readouterr().out
        assert code == 0 and "times the floor" in told and "worst offenders" in told and "gigatok_ds/" in told
        row = benchmark.figures.read(tmp_path / "figures.json").figures[0]
        assert 0 < row.ours < row.reference and row.case.startswith(recipe.name)
        assert benchmark.main([str(tmp_path / "gpt.yaml"), "--micro", "8", "--markdown"]) == 0
    head, _, line = capsys.readouterr().out.strip().splitlines()
    assert head.count("|") == line.count("|") == 11 and "every step" in line
