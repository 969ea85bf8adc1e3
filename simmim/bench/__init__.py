"""Benchmarks of training: the device memory of a step, estimated and measured."""
