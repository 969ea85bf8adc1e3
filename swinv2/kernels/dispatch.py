"""The one place that chooses a kernel: by device, precision, and how the call is executed.

A call runs eagerly, is compiled by torch.compile, is exported for programs without this code, or is
intercepted operator by operator by a dispatch mode (a FLOP counter, fake tensors). Kernels with a
backward of their own exist twice: as autograd functions, which are the fastest eagerly, and as
custom operators, which compilers and dispatch modes see as one operation.
"""

from typing import Literal

import torch
from torch import Tensor

from swinv2.compat import COMPILING_IS_EXPORTING, HAS_LINEAR_POINTWISE, in_dispatch_mode

AttentionPath = Literal["auto", "explicit", "sdpa", "sequential"]
AttentionKernel = Literal["explicit", "sdpa", "sequential", "sequential_saving", "fused"]

ONEDNN_IS_FAST = torch.backends.cpu.get_cpu_capability() == "AVX512" and HAS_LINEAR_POINTWISE

LARGE_WINDOW = 256
"""Tokens of a window above which the scores of one head are too few for a fast product."""


def choose_attention(path: AttentionPath, qkv: Tensor) -> AttentionKernel:
    """Return the attention kernel for a path of `swinv2.config.Execution` and the tokens given.

    auto is
    - explicit in an exported graph, which has PyTorch's own operators only;
    - fused in compiled blocks, except for float32 on a CPU, where groups of windows are as fast and
      take less memory;
    - otherwise sequential, with the attention weights saved for the backward.
    """
    if path != "auto":
        return path
    if is_exporting():
        return "explicit"
    float_on_cpu = qkv.is_cpu and qkv.dtype == torch.float32
    if torch.compiler.is_compiling() and not float_on_cpu:
        return "fused"
    return "sequential_saving"


def choose_scores_at_a_time(tokens: int, *, on_cpu: bool) -> int:
    """Return how many scores a group of windows of `tokens` tokens has by default.

    On a CPU they fit into its cache: 2 MB in float32, 8 MB in large windows.
    """
    if not on_cpu:
        return 2**27
    return 2**21 if tokens > LARGE_WINDOW else 2**19


def use_onednn(tokens: Tensor) -> bool:
    """Return whether linear layers call oneDNN: it is fast here and takes these tokens."""
    return (
        tokens.dtype in (torch.float32, torch.bfloat16)
        and tokens.is_cpu
        and tokens.numel() > 0
        and not is_exporting()
        and ONEDNN_IS_FAST
        and (torch.compiler.is_compiling() or bool(torch.backends.mkldnn.enabled))
    )


def use_operators() -> bool:
    """Return whether to call custom operators instead of autograd functions.

    They are needed where operations are compiled, or intercepted by a dispatch mode.
    """
    return torch.compiler.is_compiling() or in_dispatch_mode()


def is_exporting() -> bool:
    """Return whether a graph is traced for other programs, which have PyTorch's operators only."""
    exporting = torch.compiler.is_exporting()
    if COMPILING_IS_EXPORTING and torch.compiler.is_dynamo_compiling():
        exporting = False
    return exporting or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_compiling_kernels() -> bool:
    """Return whether a graph is compiled that may contain custom operators."""
    return torch.compiler.is_compiling() and not is_exporting()
