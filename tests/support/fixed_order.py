"""Matrix products and sums that run in one order, whatever stands beside a row or a column."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FixedOrder(TorchDispatchMode):
    """Makes every product, and every sum along dimensions, term by term, from the first to the last.

    A library chooses its kernel, and with it the order of its sums, by the sizes of the whole: a column may get other
    bits if there are fewer beside it. Here it never does, and a term that is 0 changes nothing.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            a, b = args[-2:]
            y = a.new_zeros(*a.shape[:-1], b.shape[-1])
            for k in range(a.shape[-1]):
                y = y + a[..., k : k + 1] * b[..., k : k + 1, :]
            if len(args) == 3:
                y = args[0] + y
        elif name == "sum" and len(args) > 1 and args[1] and args[0].is_floating_point():
            y = args[0].to(kwargs.get("dtype") or args[0].dtype)
            keep = len(args) > 2 and args[2]
            for dim in sorted((d % y.dim() for d in args[1]), reverse=True):
                summed = reduce(add, y.unbind(dim))
                y = summed.unsqueeze(dim) if keep else summed
        else:
            assert "_grouped_mm" not in name  # a kernel of its own: take sizes that it does not
            return function(*args, **kwargs)
        target = kwargs.get("out", args[0] if name.endswith("_") else None)
        return y if target is None else target.copy_(y)
