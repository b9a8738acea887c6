"""``python -m twinrl``: the command line, e.g. under torchrun."""

from twinrl.cli import main

if __name__ == "__main__":
    main()
