"""`python -m simmim`, which launchers start on every process."""

import sys

from data_prep.format.systems import require_posix


def main() -> None:
    """Run the command of this process; signals and streams are handled before it is imported."""
    require_posix("simmim")
    from simmim.start import start_process  # noqa: PLC0415 (its signals are those of POSIX)

    start_process(sys.argv[1:])
    try:
        from simmim.cli import run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:  # while a command is imported
        sys.stderr.write("simmim: interrupted\n")
        sys.exit(128 + 2)


if __name__ == "__main__":
    main()
