"""`python -m simmim`, which launchers start on every process."""

import sys

from simmim.start import start_process


def main() -> None:
    """Run the command of this process; signals and streams are handled before it is imported."""
    start_process(sys.argv[1:])
    from simmim.cli import run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
