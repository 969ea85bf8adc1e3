"""Batches: sampler, workers, shared memory, damaged samples."""
