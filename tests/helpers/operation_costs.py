"""Operations and bytes of what runs, as a GPU without a compiler would have them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Costs(TorchDispatchMode):
    """As a context: the operations within that are more than a view, and the bytes of tensors that they read and write;
    of the latter `but_products` without matrix products."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes, self.but_products = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not function.is_view and function is not torch.ops.aten.detach.default:
            results = result if isinstance(result, tuple | list) else [result]
            made = [value for value in results if not any(value is argument for argument in args)]
            written = [value for value, declared in zip(args, function._schema.arguments, strict=False)
                       if declared.alias_info is not None and declared.alias_info.is_write]
            moved = sum(value.nbytes for value in (*args, *written, *made) if isinstance(value, torch.Tensor))
            self.operations.append(str(function))
            self.bytes += moved
            self.but_products += moved if "mm" not in str(function) else 0
        return result
