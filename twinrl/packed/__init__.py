"""Several runs in one process, their networks' calls batched; every run stays an ordinary run.

    networks = Networks(2)
    trainers = [Trainer(settings, …, ranks=Member(networks, i)) for i, settings in enumerate(both)]
    ended = networks.rendezvous.run([trainer.train for trainer in trainers])

Each :class:`twinrl.trainer.Trainer` has its own directory, log, checkpoints, events and detectors, and does what it
does alone. *When to use*: many seeds of a tiny network, or of a small one on a large GPU, where the cost of a step is
the number of its operations and not their size; ``benchmarks/packed.py`` measures whether it pays.
"""

from twinrl.packed.member import Member, check_packed
from twinrl.packed.networks import Networks
from twinrl.packed.rendezvous import Abandoned, Ended, Rendezvous

__all__ = ["Abandoned", "Ended", "Member", "Networks", "Rendezvous", "check_packed"]
