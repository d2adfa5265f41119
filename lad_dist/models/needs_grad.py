"""What a backward pass wants of an operation with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch


def needs_grad(ctx: Any) -> tuple[bool, ...]:
    """For each tensor of an operation (they come first), whether the backward pass under way uses the derivative by it.

    To be called in ``backward``. ``ctx.needs_input_grad`` says only which have a graph: the weights too, when a step's gradient
    is differentiated by its images alone, and the images, when a step's gradient is taken by its weights.
    """
    nodes = (node for node, _ in ctx.next_functions)
    return tuple(could and _runs(node) for could, node in zip(ctx.needs_input_grad, nodes, strict=False))


def _runs(node: Any) -> bool:
    """Whether the pass goes on through ``node``, which made the tensor."""
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that ``autograd.grad`` was asked for: torch says so by refusing to say
        return True
