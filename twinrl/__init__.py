"""twinrl: an experiment framework for RL-augmented TwinFlow, and the trainer that shows why it diverges."""

__version__ = "0.1.0"
