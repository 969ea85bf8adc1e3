"""Retries of reads while a shard is missing or truncated: a file server may be down briefly."""

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from data_prep.format.text import count_noun
from simmim.data.order.source import DataError

FIRST_PAUSE = 0.1
"""Seconds before the second attempt; each further pause is twice as long, with jitter."""

LONGEST_PAUSE = 20.0
"""Longest pause between two attempts, in seconds."""

WARN_FROM = 0.7
"""Shortest pause, in seconds, that a warning is printed for."""

Result = TypeVar("Result")


class ShardUnavailableError(DataError):
    """A shard is missing or shorter than it should be; it may come back."""


def retry(read: Callable[[], Result], attempts: int) -> Result:
    """Return the result of `read`, called again while a shard is unavailable.

    Raises:
        DataError: it is still unavailable after `attempts` calls.
    """
    for attempt in range(1, attempts):
        try:
            return read()
        except ShardUnavailableError as error:
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
            pause = random.uniform(longest / 2, longest)
            if longest > WARN_FROM:
                sys.stderr.write(
                    f"\nWARNING: {error}; retrying in {pause:.1f} s"
                    f" (attempt {attempt} of {attempts} failed, data.attempts)\n"
                )
            time.sleep(pause)
    try:
        return read()
    except ShardUnavailableError as error:
        tried = count_noun(attempts, "attempt")
        raise DataError(f"{error} (after {tried}, data.attempts).") from None
