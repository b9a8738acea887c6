"""``python -m ablations.packed CONFIG OUTPUT [CONFIG OUTPUT]…``: trials of one arm packed into this process.

Each trial is begun or resumed as its run directory says and writes into its own OUTPUT what ``twinrl train`` would
print. Exits with 0 if all have ended well, else with the first other exit code. Does not import Ray.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from twinrl import schema
from twinrl.commands.packed import train
from twinrl.config import read_yaml, validate
from twinrl.errors import InputError


def main(arguments: Sequence[str]) -> int:
    """Train the trials; the exit code."""
    with ExitStack() as stack:
        consoles = [
            Console(file=stack.enter_context(Path(output).open("a", buffering=1)), soft_wrap=True)
            for _, output in _pairs(arguments)
        ]
        try:
            codes = train([validate(schema.RunConfig, read_yaml(Path(c))) for c, _ in _pairs(arguments)], consoles)
        except InputError as error:  # of all
            for console in consoles:
                console.print(f"twinrl: {error}", markup=False)
            return 2
    return next((code for code in codes if code), 0)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(arguments[::2], arguments[1::2], strict=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
