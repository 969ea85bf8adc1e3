"""x"""

from simmim.engine.run import RunFolder


def write_report(run: RunFolder) -> None:
    """x."""
