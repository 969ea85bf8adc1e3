"""Exit codes of a training, and the error behind the last of them."""

import errno

BAD_INPUT = 2
"""The input cannot be used, or training diverged: something has to be fixed first."""

STOPPED = 75
"""Stopped on request, with a checkpoint: EX_TEMPFAIL, "try again later"."""

LOST = 76
"""A rank hung, a rank or a data worker was lost, or memory ran out: resume from the last
checkpoint."""

NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "Invalid buffer size",
    "integer multiplication overflow",
    "std::bad_alloc",
)
"""What torch and the system say where memory ran out, or was asked for beyond all measure."""


class RankLostError(RuntimeError):
    """Another rank failed or is gone, so this one cannot continue."""


def out_of_memory(error: BaseException) -> str | None:
    """Return a message on memory that ran out in this process, None for another error."""
    text = (str(error).strip().splitlines() or [""])[0]
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    known = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    if not (isinstance(error, MemoryError) or no_memory or known):
        return None
    said = f" ({text})" if text else ""
    return (
        f"memory ran out{said}: lower training.batch_size or raise training.accumulation, lower "
        "data.workers, choose a smaller encoder, or give the job more memory. `simmim doctor` and "
        "`simmim bench memory` count what a training needs."
    )
