"""Waiting for shards that are gone or cut off: a file server may be away, or a copy under way."""

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from simmim.data.order.errors import DataError

FIRST_PAUSE = 0.1
"""Seconds before the second attempt; each later one waits twice as long, with jitter."""

LONGEST_PAUSE = 20.0
"""Most seconds between two attempts."""

TOLD_FROM = 0.7
"""Seconds of a pause from which on a person is told of it."""

Result = TypeVar("Result")


class ShardAmissError(DataError):
    """A shard that is gone or shorter than it should be; it may come back."""


def patiently(read: Callable[[], Result], attempts: int) -> Result:
    """Return what `read` returns, which is called again while a shard is amiss.

    Raises:
        DataError: it is after `attempts` calls.
    """
    for attempt in range(1, attempts):
        try:
            return read()
        except ShardAmissError as error:
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
            pause = random.uniform(longest / 2, longest)
            if longest > TOLD_FROM:
                sys.stderr.write(
                    f"\nWARNING: {error}; trying again in {pause:.1f} s ({attempt} of {attempts}"
                    " attempts, data.attempts)\n"
                )
            time.sleep(pause)
    try:
        return read()
    except ShardAmissError as error:
        raise DataError(f"{error} (after {attempts} attempts, data.attempts)") from None
