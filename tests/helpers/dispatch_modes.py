"""What a GPU would run, noted on tensors without storage."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Operators that are more than views, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        if not function.is_view and name not in ("detach", "empty_like", "empty"):
            self.names.append(name)
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result))
                              if isinstance(leaf, torch.Tensor))
        return result


class Layouts(TorchDispatchMode):
    """Refuses a convolution of a map that lies in the default layout, or that gives one."""

    def __init__(self):
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            self.convolutions += 1
            for map in (args[0], result):
                assert map.is_contiguous(memory_format=torch.channels_last), map.shape
        return result
