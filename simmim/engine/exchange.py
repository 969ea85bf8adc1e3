"""What ranks tell each other between steps, so that all of them do the same thing next."""

from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
import torch.distributed


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """What a rank has to say between two steps; or, once exchanged, whether any rank says it."""

    stop: bool = False
    """A signal asked to stop."""
    writing: bool = False
    """A checkpoint is still being written."""
    failed: bool = False
    """A checkpoint could not be written."""


class Exchange:
    """Tells every rank what any rank says. All ranks build it, and ask it, together.

    Its process group is its own and on the CPU: asking never waits for the accelerator.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._group: torch.distributed.ProcessGroup | None = None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def any_rank(self, own: StepFlags) -> StepFlags:
        """Return each flag as the "or" of all ranks."""
        if self._group is None:
            return own
        flags = torch.tensor(astuple(own), dtype=torch.int32)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self._group)
        stop, writing, failed = flags.bool().tolist()
        return StepFlags(stop=stop, writing=writing, failed=failed)
