"""Which derivatives a backward pass needs from an operation with a custom derivative."""

from __future__ import annotations

from typing import Any

import torch


def needs_grad(ctx: Any) -> tuple[bool, ...]:
    """Return for each tensor argument (they come first) whether the running backward pass uses the derivative by it.

    Call it in ``backward``. ``ctx.needs_input_grad`` only tells which tensors have a graph: that includes the weights
    when a step's gradient is differentiated by its images alone, and the images when a step's gradient is taken by its
    weights.
    """
    nodes = (node for node, _ in ctx.next_functions)
    return tuple(could and _runs(node) for could, node in zip(ctx.needs_input_grad, nodes, strict=False))


def _runs(node: Any) -> bool:
    """Return whether the pass continues through ``node``, which made the tensor."""
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf passed to ``autograd.grad``: torch raises for exactly these
        return True
