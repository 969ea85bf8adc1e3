"""Parallel execution of tasks, in local processes or on a Ray cluster."""
