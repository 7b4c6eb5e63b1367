"""From a traced graph to compiled code: counted, said aloud while requests wait for it, and with attention that is
caught outside of graphs still caught inside.

Knows torch's compiler and nothing of models. `compiled` is the one way in which this package compiles anything.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from denoised.attention.intercept import asked, graph_attention
from denoised.steps.tally import count

# Variants of one function: rows one or several, with a mask and without, and kinds of blocks of one class.
MAX_VARIANTS = 64
_log = logging.getLogger(__name__)
_local = threading.local()
_PLAIN = torch.nn.functional.scaled_dot_product_attention


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called, for tensors of any lengths.

    Lengths of texts, sizes and numbers of rows change from tick to tick, so all of them are left open from the first
    compilation on. A length of 1 is one that torch always compiles for by itself.
    """
    compile: Any = torch.compile
    result: Callable[..., Any] = compile(
        function, dynamic=True, backend=_to_code, recompile_limit=MAX_VARIANTS, isolate_recompiles=True
    )
    return result


@contextlib.contextmanager
def open_lengths() -> Iterator[None]:
    """Within it, lengths that happen to be equal are not taken for one: next time they may differ."""
    from torch.fx.experimental import _config as shapes

    before = shapes.use_duck_shape
    shapes.use_duck_shape = False
    try:
        yield
    finally:
        shapes.use_duck_shape = before


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """Within it, nobody waits for what this thread compiles: it is a start, no request."""
    _local.expected = True
    try:
        yield
    finally:
        _local.expected = False


def _to_code(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """What torch calls with each graph that it has traced."""
    started = time.perf_counter()
    if asked():
        _catch_attention(graph)
    code = generate(graph, inputs)
    seconds = time.perf_counter() - started
    count("compiled_graphs")
    count("compile_ms", round(seconds * 1000))
    if not getattr(_local, "expected", False):
        count("recompiles")
        _log.warning("a request had to wait %.1f s for code that was not compiled at the start", seconds)
    return code


def generate(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Code for this device, by torch's own compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)


def _catch_attention(graph: fx.GraphModule) -> None:
    """Call `denoised::attention` where the graph calls torch's."""
    for node in [node for node in graph.graph.nodes if node.op == "call_function" and node.target is _PLAIN]:
        arguments = _in_order(*node.args, **node.kwargs)
        with graph.graph.inserting_before(node):
            caught = graph.graph.call_function(graph_attention._opoverload, arguments)
        caught.meta = dict(node.meta)
        node.replace_all_uses_with(caught)
        graph.graph.erase_node(node)
    graph.recompile()


def _in_order(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, is_causal, scale, enable_gqa
