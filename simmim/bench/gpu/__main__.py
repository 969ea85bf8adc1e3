"""`python -m simmim.bench.gpu`: `simmim bench gpu` on a machine without the packages of data."""

import sys

from simmim.bench.gpu.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
