"""What the command line's commands do, free of its parsing; heavy imports belong here, not in ``twinrl.cli``."""

import os
import shutil
import sys


def program() -> str:
    """How this shell starts twinrl: its name where it is on the path, else its file, for commands to be copied."""
    off_path = shutil.which("twinrl") is None and os.path.basename(sys.argv[0]) == "twinrl"
    return os.path.relpath(sys.argv[0]) if off_path else "twinrl"
