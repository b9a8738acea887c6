"""What the command line's commands do, free of its parsing; heavy imports belong here, not in ``twinrl.cli``."""
