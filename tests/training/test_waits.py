"""Nothing in a step waits for the device: neither the passes, nor the decision about the step, nor DeepSpeed's update.

Passes are run on tensors without storage, which stand for a device: a number cannot be read from them, and what comes
from the host is seen. What DeepSpeed does runs on the CPU, where each reading of a number is seen.
"""

import ast
import traceback
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from rank_runs import run_ranks
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigatok_ds import transfer
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.optimizer import OptimizerConfig

PACKAGE = Path(transfer.__file__).parent
META = torch.device("meta")
# Operations whose result the host reads, or whose shape it must know.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Notes where the host reads what is on the device, or copies to it other than by `to_device`."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.device, self.found = torch.device(device), []
        self._calls = Calls(self)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        name = str(function)
        if any(read in name for read in READS) and any(tensor.device == self.device for tensor in tensors):
            self._note(name)
        masks = arguments[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        if any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self._note(name)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        # Operations take a number of the host as a part of their launch; a copy brings it.
        places = {tensor.device.type for tensor in [*tensors, *results]
                  if tensor.dim() or name.startswith(("aten._to_copy", "aten.copy_"))}
        if len(places) > 1 and not any(frame.name == "to_device" for frame in traceback.extract_stack(limit=8)):
            self._note(name)
        return result

    def _note(self, name):
        ours = [frame for frame in traceback.extract_stack() if "deepspeed" in frame.filename or "gigatok_ds"
                in frame.filename]
        self.found.append((name, *(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-2:])))


class Calls(TorchFunctionMode):
    """Notes methods that read many numbers at once, which are no operations to a dispatcher."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy) and arguments[0].device == self.waits.device:
            self.waits._note(function.__name__)
        return function(*arguments, **(options or {}))


def test_what_waits_is_noticed():
    tensor = torch.zeros(3, device="meta")
    with Waits("meta") as waits:
        transfer.to_device(torch.ones(3), META)
        tensor + 1.0
        assert not waits.found
        for wrong in (lambda: torch.ones(3).to(META), lambda: tensor.copy_(torch.ones(3))):
            before = len(waits.found)
            wrong()
            assert len(waits.found) == before + 1
    with pytest.raises(NotImplementedError):
        tensor.to("cpu")
    numbers = torch.arange(3.0)
    with Waits() as waits:
        for wrong in (lambda: numbers[0].item(), lambda: numbers.nonzero(), lambda: numbers[numbers > 1],
                      lambda: bool(numbers[0]), lambda: numbers.tolist(), lambda: numbers.numpy()):
            before = len(waits.found)
            wrong()
            assert len(waits.found) > before


def test_only_pinned_memory_travels_without_waiting(monkeypatch):
    """`to_device` pins for a GPU; whoever else asks for a copy that does not wait is listed here, with what it copies.
    """
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: (device, non_blocking))
    tensor, gpu = torch.ones(3), torch.device("cuda", 0)
    assert transfer.to_device(tensor, gpu) == (gpu, True) and pinned == [tensor]
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if any(
        isinstance(node, ast.keyword) and node.arg == "non_blocking" for node in ast.walk(ast.parse(path.read_text())))}
    assert users == {"transfer.py",
                     "data/prefetch.py",  # batches of the data loader, which pins them
                     "training/code_sources.py",  # images that prefetch has brought already
                     "sampling/read_later.py",  # no step of training, and into pinned memory
                     "resilience/step_guard.py", "engine/host_copies.py"}  # into pinned memory


# With every loss term of either phase.
TOKENIZERS = [("dino", 30_000), *(pytest.param(*case, marks=pytest.mark.slow)
                                  for case in (("dino", 1), ("patchgan", 30_000), ("stylegan", 30_000)))]


@pytest.mark.parametrize("discriminator, step", TOKENIZERS)
def test_a_tokenizers_passes_do_not_wait(discriminator, step):
    from gigatok_ds.dry_run.dry_run import Rehearsal

    recipe = load_recipe("VQ_SS256",
                         [f"loss.adversarial.discriminator={discriminator}", "data.train=x", "data.validation=x"])
    rehearsal = Rehearsal(recipe)
    with Waits("meta") as waits:
        rehearsal._tokenizer(recipe, 8, step)
    assert waits.found == []


def test_a_gpts_passes_do_not_wait():
    from gigatok_ds.models.gpt import GPT
    from gigatok_ds.parallel.dropout import name_dropouts
    from gigatok_ds.parallel.topology import single_process
    from gigatok_ds.training.gpt_task import GPTTask

    recipe = load_recipe("GPT-B", ["data.train=x", "data.validation=x"])
    with META:
        network = GPT(recipe.model)
    name_dropouts(network)

    class Trained:
        def __init__(self):
            self.network = network

        def __call__(self, *inputs):
            return network(*inputs)

        def backward(self, loss):
            loss.backward()

    task = object.__new__(GPTTask)
    task.recipe, task.topology, task.engine = recipe, single_process("meta"), Trained()
    batch = {"codes": torch.zeros((2, 256), dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64),
             "position": torch.arange(2)}
    task.train_micro_batch(batch, 1)  # brings the table of positions, once
    with Waits("meta") as waits:
        task.train_micro_batch(batch, 1)
    assert waits.found == []


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(layers=nn.Sequential(OrderedDict({
        "0": nn.Linear(8, 16), "1": nn.LayerNorm(16), "2": nn.Linear(16, 4)}))))
    network.register_buffer("seen", torch.zeros(3))
    return network


def step_of(stage, precision, kind):
    """What waits in each step of an engine and a guard, and what both left; the last step's gradients are not finite.
    """
    from deepspeed.accelerator import get_accelerator

    from gigatok_ds.config.faults import FaultConfig
    from gigatok_ds.engine.engine import Engine
    from gigatok_ds.parallel.topology import start_process_group
    from gigatok_ds.resilience.step_guard import StepGuard

    topology = start_process_group()
    settings = zero_settings(stage)
    settings |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
                 "gradient_clipping": 0.1, "steps_per_print": 10**9, "bf16": {"enabled": precision == "bf16"},
                 "fp16": {"enabled": False}}
    engine = Engine(small_network, OptimizerConfig(kind=kind, max_grad_norm=0.1), settings, topology=topology,
                    ema_decay=0.9)
    guard = StepGuard(FaultConfig(), {"only": engine}, topology, fp16=False)
    synchronized, accelerator = [], get_accelerator()
    # As on a GPU, where streams do not order themselves.
    if stage < 3:
        accelerator.resolves_data_dependency, accelerator.synchronize = lambda: False, lambda *_: synchronized.append(1)
    inputs = torch.randn(4, 8, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    found, states = [], []
    for factor in (1.0, 1.0, 1.0, float("nan")):
        with Waits() as waits:
            guard.begin()
            engine.network.seen += 1
            loss = engine(inputs).float().square().mean() * factor
            engine.backward(loss)
            guard.decide({"only": 1e-3}, {"loss": loss.detach()})
        found.append(waits.found)
        kinds = guard.verdict().kind
        states.append((kinds, engine.gradient_norm(), engine.network.seen.clone(),
                       [values.clone() for _, values
                        in [*engine._state.fragments().values(), *engine.ema.fragments.values()]],
                       engine._state._adam_steps()))
    return found, len(synchronized), states


@pytest.mark.parametrize("stage, precision, kind", [
    (0, "fp32", "adamw"), (1, "bf16", "adamw"), pytest.param(1, "fp32", "adamw", marks=pytest.mark.slow),
    (2, "bf16", "adamw"), (3, "bf16", "adamw"), pytest.param(0, "bf16", "adamw", marks=pytest.mark.slow),
    (2, "bf16", "muon"), *(pytest.param(*case, "muon", marks=pytest.mark.slow)
                           for case in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "bf16")))])
def test_an_update_waits_only_where_deepspeed_does(stage, precision, kind):
    """At stage 3 DeepSpeed reads the gradient norm before it updates, at stage 0 in bf16 it looks at each gradient. By
    default it would also wait for the whole device at each forward pass and update, to measure how fast it is."""
    (found, synchronized, states), = run_ranks(step_of, 1, stage, precision, kind)
    assert synchronized == 0
    if stage == 3:  # at first it compares what ranks do, too
        assert [len(waits) for waits in found[2:]] == [1, 1] and all("stage3.py" in str(waits) for waits in found)
    elif (stage, precision) == (0, "bf16"):
        assert all("unfused_optimizer.py" in str(waits) or "utils.py" in str(waits) for waits in found)
    else:
        assert found == [[], [], [], []]
    (*_, other_values, _), (kind, norm, seen, values, steps), (last_kind, *last) = states[1:]
    assert (kind, last_kind) == ("accept", "skip") and not torch.equal(values[0], other_values[0])
    assert last[0] == norm and torch.equal(last[1], seen) and last[3] == steps
    assert all(torch.equal(one, other) for one, other in zip(values, last[2], strict=True))
