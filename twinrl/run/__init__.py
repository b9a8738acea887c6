"""A run on disk: which files its directory has (:mod:`~twinrl.run.layout`), and what reads and writes them."""
