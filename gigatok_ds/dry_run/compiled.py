"""What a compiled block runs on a GPU: the kernels that torch's Inductor would make of it, without making them and
without a GPU.

A block is traced forward and backward, cut in two where the compiler would cut it (min-cut), lowered for a GPU that is
only claimed to be there, and scheduled: Inductor's own scheduler says what is fused with what, and which bytes each
kernel reads and writes (`BaseSchedulerNode.get_read_write_buffer_accesses`: every tensor at most once). No code is
generated.

What is left out: graph breaks, which would only add kernels, and patterns that Inductor replaces before it cuts the
graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from gigatok_ds.dry_run.meter import as_on_a_gpu
from gigatok_ds.dry_run.operators import FORMULAS, group_of, is_free, kind_of, name_of
from gigatok_ds.dry_run.source_lines import SourceLine, Sources
from gigatok_ds.dry_run.work import Operation, Work
from gigatok_ds.errors import InputError

_CLAIMED = torch.device("cuda:0")
_PLACE = "gigatok_place"


class Passes(NamedTuple):
    """What a block runs forward and backward."""

    forward: Work
    backward: Work


class Looks(NamedTuple):
    """What the compiler asks of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class CompiledBlock(NamedTuple):
    """A block's module, what its forward pass is without a compiler, and its arguments, with `Looks` instead of
    tensors.
    """

    module: nn.Module
    forward: Callable
    arguments: tuple
    options: dict


_COUNTED: dict[Hashable, Passes] = {}


def block_of(module: nn.Module, forward: Callable, arguments: tuple, options: dict) -> CompiledBlock:
    """Keeps no tensor of the arguments."""
    return CompiledBlock(module, forward, *pytree.tree_map(_looks, (arguments, options)))


def signature_of(block: CompiledBlock) -> Hashable:
    """Equal for blocks of which the compiler makes the same."""
    held = [(name, _looks(tensor)) for name, tensor in _held(block).items()]
    leaves, tree = pytree.tree_flatten((block.arguments, block.options), is_leaf=_is_looks)
    return repr(block.module), block.module.training, tuple(held), str(tree), tuple(map(str, leaves))


def _held(block: CompiledBlock) -> dict[str, Tensor]:
    return dict([*block.module.named_parameters(), *block.module.named_buffers()])


def _looks(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return Looks(tuple(value.shape), value.stride(), value.dtype, value.requires_grad)


def passes_of(signature: Hashable, block: CompiledBlock) -> Passes:
    """Counted once in a process. Raises InputError where this torch's compiler cannot be asked."""
    if signature not in _COUNTED:
        try:
            _COUNTED[signature] = _count(block)
        except (AttributeError, ImportError, TypeError) as error:
            raise InputError(f"torch {torch.__version__} does not tell what its compiler would fuse ({error}); set "
                             "training.compile=none for figures without it") from error
    return _COUNTED[signature]


def _count(block: CompiledBlock) -> Passes:
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[Work] = []

    def cut(joint: fx.GraphModule, *inputs, **options) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs = min_cut_rematerialization_partition(joint, *inputs, **options)
        forward, backward = graphs
        found.extend([_scheduled(forward, backward=False), _scheduled(backward, backward=True)])
        return graphs

    def compile_joint(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable:
        if not found:  # nothing here takes a gradient
            found.extend([_scheduled(gm, backward=False), Work()])
        return gm.forward

    with as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _with_places():
        held = {name: _like(_looks(tensor)) for name, tensor in _held(block).items()}
        arguments, options = pytree.tree_map(_like, (block.arguments, block.options), is_leaf=_is_looks)
        bare = _BareBlock(block)

        def run(held: dict, arguments: tuple, options: dict):
            return torch.func.functional_call(bare, {f"block.{name}": value for name, value in held.items()}, arguments,
                                              options)

        aot_function(run, fw_compiler=compile_joint, bw_compiler=compile_joint, partition_fn=cut,
                     decompositions=select_decomp_table())(held, arguments, options)
    return Passes(*found)


class _BareBlock(nn.Module):
    """The block without what is done around its forward pass."""

    def __init__(self, block: CompiledBlock):
        super().__init__()
        self.block, self._forward = block.module, block.forward

    def forward(self, *arguments, **options):
        return self._forward(*arguments, **options)


def _is_looks(value: object) -> bool:
    return isinstance(value, Looks)


def _like(value: object) -> object:
    """A tensor without storage that looks so."""
    if not isinstance(value, Looks):
        return value
    made = torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")
    return made.requires_grad_(value.requires_grad)


@contextlib.contextmanager
def _with_places() -> Iterator[None]:
    """Within, nodes of graphs know which of our lines made them."""
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer

    create, sources = PythonKeyTracer.create_node, Sources()

    def noting(tracer: PythonKeyTracer, *arguments, **options) -> fx.Node:
        node = create(tracer, *arguments, **options)
        node.meta[_PLACE] = sources.here(None)
        return node

    with patch.object(PythonKeyTracer, "create_node", noting):
        yield


def _scheduled(graph: fx.GraphModule, *, backward: bool) -> Work:
    """The kernels of a graph on tensors of the meta device."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    graph, mode = fx.GraphModule(graph, copy.deepcopy(graph.graph)), FakeTensorMode(allow_non_fake_inputs=True)
    inputs = _claim(graph, mode)
    with _claimed_gpu(), config.patch(compile_threads=1), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None, is_backward=bool(backward))
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            scheduler = Scheduler(lowering.operations)
            return Work(Counter(operation for node in scheduler.nodes if (operation := _operation(node)) is not None))


def _claim(graph: fx.GraphModule, mode) -> list:
    """Moves the graph to the GPU; returns inputs for it. Constants become inputs."""
    inputs: list[object] = []
    with mode:
        for node in list(graph.graph.nodes):
            value = node.meta.get("val")
            if node.op == "get_attr" and isinstance(getattr(graph, node.target, None), Tensor):
                value = getattr(graph, node.target)
                with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                    made = graph.graph.placeholder(f"constant_{len(inputs)}")
                node.replace_all_uses_with(made)
                graph.graph.erase_node(node)
                inputs.insert(0, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CLAIMED))
            elif node.op == "placeholder":
                inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CLAIMED)
                              if isinstance(value, Tensor) else value)
            elif "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": _CLAIMED}
    graph.recompile()
    return inputs


@contextlib.contextmanager
def _claimed_gpu() -> Iterator[None]:
    """Within, Inductor takes device 0 for an H100 with Triton. Nothing else of torch is told so."""
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    h100 = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
                            regs_per_multiprocessor=65536,
                            max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)
    with (patch.object(DeviceProperties, "create", classmethod(lambda cls, device: h100)),
          patch.object(scheduler, "has_triton", lambda *device: True)):
        yield


def _operation(node) -> Operation | None:
    """The operation of a node of Inductor's scheduler; None where nothing runs."""
    read, written = (sum(node.get_read_write_buffer_accesses(include_reads=reads, include_writes=not reads).values())
                     for reads in (True, False))
    if not read + written:
        return None
    origins = [origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins()
               if isinstance(origin.target, OpOverload)]
    places = [origin.meta[_PLACE] for origin in origins if _PLACE in origin.meta and origin.meta[_PLACE].source]
    # What a library or a kernel of its own computes, or what is generated for all of these.
    called = _called(node, origins)
    if called is not None and is_free(operator := _operator(called)):
        return None
    if called is not None:
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in called.args]
        formula, of_call = FORMULAS.get(operator._overloadpacket), called.meta.get(_PLACE)
        return Operation(group=group_of(operator), name=name_of(operator).removeprefix("aten::"),
                         source=of_call.source if of_call else _first(places), kind=kind_of(operator, values),
                         read=read, written=written, flops=formula(*values, **called.kwargs, out_val=called.meta["val"])
                         if formula else 0)
    names = sorted({name_of(_operator(origin)).removeprefix("aten::").removeprefix("prims::") for origin in origins})
    return Operation(group=_fused_group(node, origins), name="fused " + " ".join(names)[:80], source=_first(places),
                     kind="half", read=read, written=written, flops=0)


def _operator(node: fx.Node) -> OpOverload:
    assert isinstance(node.target, OpOverload)
    return node.target


def _called(node, origins: list[fx.Node]) -> fx.Node | None:
    """The operator's node of one that Inductor calls and does not generate."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    if not isinstance(node, ExternKernelSchedulerNode):
        return None
    operator = getattr(node.node, "op_overload", None)
    found = [origin for origin in origins if origin.target is operator or _operator(origin)._overloadpacket in FORMULAS]
    return next(iter(found), None)


def _first(places: list[SourceLine]) -> str:
    """The line of most of what is fused."""
    return Counter(place.source for place in places).most_common(1)[0][0] if places else ""


def _fused_group(node, origins: list[fx.Node]) -> str:
    if node.is_reduction() or any(origin.meta[_PLACE].norm for origin in origins if _PLACE in origin.meta):
        return "norm"
    operators = [_operator(origin) for origin in origins]
    return "copies" if all(group_of(each) == "copies" or each.is_view for each in operators) else "pointwise"
