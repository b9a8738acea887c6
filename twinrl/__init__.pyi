"""What `import twinrl` offers, for type checkers; `__init__.py` imports each when it is asked for."""

from typing import Any

from twinrl.commands.interactive import Run as Run
from twinrl.commands.interactive import load as load
from twinrl.commands.interactive import train as train
from twinrl.training.watching import Stopped as Stopped
from twinrl.training.watching import Watch as Watch
from twinrl.training.watching import watch as watch

__version__: str

def register(cls: type) -> None: ...
def __getattr__(name: str) -> Any: ...
