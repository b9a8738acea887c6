"""Data: what every source offers (:mod:`twinrl.data.source`), how a step reads its rows, and the sources."""
