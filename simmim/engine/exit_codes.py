"""Exit codes of a training, and the error behind the last of them."""

BAD_INPUT = 2
"""The input cannot be used, or training diverged: something has to be fixed first."""

STOPPED = 75
"""Stopped on request, with a checkpoint: EX_TEMPFAIL, "try again later"."""

LOST = 76
"""A rank hung, or a rank or a data worker was lost: resume from the last checkpoint."""


class RankLostError(RuntimeError):
    """Another rank failed or is gone, so this one cannot continue."""
