"""`python -m simmim`, which launchers start on every process."""

from simmim.cli import run

if __name__ == "__main__":
    run()
