"""``python -m tests.fuzz``: see ``tests/fuzz/loop.py``."""

import argparse
import sys
from pathlib import Path

from tests.fuzz import loop
from tests.fuzz.targets import TARGETS

parser = argparse.ArgumentParser(description=loop.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--count", type=int, default=2000, help="mutations in all (default 2000)")
parser.add_argument("--seed", type=int, default=0, help="decides every mutation (default 0)")
parser.add_argument("--only", nargs="+", default=(), choices=TARGETS, help="what to damage")
parser.add_argument("--again", action="store_true", help="what was found wrong, once more")
parser.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
parser.add_argument("--work", type=Path, default=Path("runs/fuzz"), help="folder of the targets and of the list")
chosen = parser.parse_args()
sys.exit(loop.main(chosen.seed, chosen.count, chosen.work.absolute(), chosen.only, chosen.again, chosen.seconds))
