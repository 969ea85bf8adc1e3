"""`python -m data_prep` is `data-prep`."""

from data_prep.cli import run

if __name__ == "__main__":
    run()
