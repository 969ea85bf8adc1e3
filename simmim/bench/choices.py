"""What the memory of a step may be counted for; imports nothing heavy."""

from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["fp32", "bf16", "bf16-weights"]
"""fp32; bf16 arithmetic over float32 weights (autocast); or weights in bf16 themselves."""
Device: TypeAlias = Literal["cuda", "cpu"]
Sharding: TypeAlias = Literal["none", "fsdp2"]

MASK_CELL = 32
"""Side of a mask cell in pixels, of images of several cells."""
GIB = 2**30

ASSUMPTIONS = """\
weights   float32; with bf16, fsdp2 computes with bf16 weights and shards the float32 ones
gradients in the precision of the forward weights; fsdp2 averages and keeps them in float32
AdamW     two states, float32
fsdp2     shards everything; gathered at a time are two blocks, the parameters outside the blocks,
          and the gradients of one block
bf16-weights: weights, gradients and states are all bf16
activations: all tensors alive at once in a step on fake tensors, with CUDA's kernels and autocast
          rules (--device cpu: the CPU's); bf16 with whole weights is autocast, including its bf16
          copies of them. On CUDA, blocks are compiled by default: the tensors kept for the backward
          pass are chosen as torch.compile chooses them, and operations between products are fused
          (--no-compile: eager blocks)
One micro-batch per step, without gradients in the forward pass and without communication buffers
for them. Not included: memory that the allocator leaves unused, GPU context and libraries."""
"""What the estimate counts."""
