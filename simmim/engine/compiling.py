"""Compiled blocks of the encoder, which run eagerly where they cannot be compiled."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simmim.compat import backward_compiled_at_once, ends_recomputation
from simmim.engine.monitor.progress import duration

Run = Callable[..., Tensor]

REMEDY = (
    "Compiling needs a C++ compiler and Python's headers (apt-get install g++ python3-dev) and, on "
    "a GPU, Triton (pip install triton); --execution.compile false does not try"
)


class CompiledBlocks:
    """The blocks of a module that `compile_blocks` has compiled; perhaps none.

    torch compiles a block when it first runs. If that fails, the block runs eagerly from that call
    on, and `run_eagerly` makes all do so, between two steps and on all ranks.

    Args:
        module: the trained module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._failure: str | None = None
        self._began: float | None = None
        self._blocks: list[Any] = [
            block for block in module.modules() if getattr(block, "compiled_run", None) is not None
        ]
        runs: dict[Run, Run] = {}
        for block in self._blocks:
            run: Run = block.compiled_run
            runs.setdefault(run, with_fallback(run, self._note))
            block.compiled_run = runs[run]

        self._is_new = bool(self._blocks)

    @property
    def failed(self) -> int:
        """1 if a block could not be compiled on this rank, until all run eagerly; else 0."""
        return int(bool(self._blocks) and self._failure is not None)

    def run_eagerly(self, gather: Callable[[str | None], list[str | None]]) -> str:
        """Run all blocks eagerly from now on, as all ranks do, and return a warning with the cause.

        Args:
            gather: returns the argument of each rank; all ranks call it together.
        """
        for block in self._blocks:
            block.compiled_run = None
        self._blocks = []
        reason = next(reason for reason in gather(self._failure) if reason is not None)
        return (
            f"WARNING: the encoder's blocks cannot be compiled and run eagerly: {reason}. {REMEDY}."
        )

    def begin_step(self) -> None:
        """Note that a step begins to compute."""
        self._began = time.perf_counter()

    def end_step(self) -> str | None:
        """Return a line on the duration of the first step, in which blocks are compiled."""
        if not self._is_new or self._failure is not None or self._began is None:
            return None
        self._is_new = False
        seconds = duration(time.perf_counter() - self._began)
        return f"the encoder's blocks are compiled: the first step took {seconds}"

    def _note(self, error: Exception) -> None:
        self._failure = self._failure or _reason(error)


def with_fallback(compiled: Run, note: Callable[[Exception], None]) -> Run:
    """Return a block's compiled function that falls back on its eager one for good.

    Args:
        compiled: takes the block and its arguments.
        note: called once, with the error that prevented compilation.
    """
    failed = False

    def run(block: Any, *args: Any) -> Tensor:
        nonlocal failed
        if not failed:
            try:
                # The backward is compiled with the forward, not when it is too late to fall back.
                with backward_compiled_at_once():
                    return compiled(block, *args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # an error that compiling is not the cause of comes again
                if ends_recomputation(error):
                    raise
                result = type(block).run(block, *args)
                failed = True
                note(error)
                return result  # type: ignore[no-any-return]
        return type(block).run(block, *args)  # type: ignore[no-any-return]

    return run


def _reason(error: BaseException) -> str:
    """Return the first line of what an error of the compiler goes back to."""
    # Dynamo's errors name the compiler's own only in an attribute.
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".:")
