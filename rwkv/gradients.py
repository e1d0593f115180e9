"""What a result has gradients for."""

from typing import Any

from torch import Tensor


def leaves(result: Tensor) -> list[Any]:
    """The tensors that a result has gradients for, in the order in which they are found."""
    found: dict[int, Tensor] = {}
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [after for after, _ in node.next_functions]
    return list(found.values())
