"""Forensics in anyone's training loop: :func:`watch` takes the gradient apart and writes an ordinary run directory.

``start.py`` begins, ``watcher.py`` is what a loop sees, ``given.py`` its losses as the gradient engine wants them,
``backwards.py`` how they are back-propagated, ``book.py`` the run directory, ``steps.py`` the optimizer's steps;
``lightning.py`` and ``hugging_face.py`` are for loops that somebody else has written.
"""

from twinrl.training.watching.start import watch
from twinrl.training.watching.watcher import Stopped, Watch

__all__ = ["Stopped", "Watch", "watch"]
