"""`python -m simmim`, which launchers start on every process."""

import sys

from data_prep.format.systems import require_posix


def main() -> None:
    """Run the command of this process; signals and streams are handled before it is imported."""
    require_posix("simmim")
    from simmim.start import start_process  # noqa: PLC0415 (its signals are those of POSIX)

    start_process(sys.argv[1:])
    from simmim.cli import run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
