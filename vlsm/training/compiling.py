"""Compilation of a model that learns, with eager execution where the compiler fails."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("vlsm")


def compile_or_warn(model: nn.Module) -> None:
    """Compile a model in place, at its first calls. If the compiler fails, one warning says so, and the model goes on.

    A compiler may lack a C++ compiler, a new enough GPU, or an operation of this model. None of this may end a training
    that works without it.
    """
    compiler = _Compiler(type(model).__name__)
    from torch._dynamo import config  # here and below: they import the compiler

    # the frontend's own errors also end in eager execution; the model's errors are raised as they are
    config.suppress_errors = True
    model.compile(backend=compiler)


class _Compiler:
    """A backend of torch.compile: torch's default one, until it fails."""

    def __init__(self, name: str) -> None:
        self._name, self._has_failed = name, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        if self._has_failed:
            return graph.forward
        from torch._dynamo.backends.registry import lookup_backend
        from torch._functorch import config

        try:
            # the gradient's graph too: later, its errors would come out of the backward pass
            with config.patch(force_non_lazy_backward_lowering=True):
                return lookup_backend("inductor")(graph, inputs, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler has no common class of errors
            self._has_failed = True
            reason = " ".join(str(error).split())[:200]
            logger.warning("%s is not compiled: %s: %s", self._name, type(error).__name__, reason)
            return graph.forward
