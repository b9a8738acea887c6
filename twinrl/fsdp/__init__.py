"""Training on several processes with FSDP2: every rank holds 1/N of student, teachers, gradients and optimizer.

    mesh.py        process group (anew after each restart), device mesh, this process's place in it
    wrap.py        which modules are sharded, and how
    initial.py     building a sharded network of which no rank ever holds the whole
    frozen.py      VAE, text encoders and reward models, of which every rank keeps 1/N between uses
    agreement.py   numbers and errors on which all ranks agree
    checkpoint.py  sharded checkpoints (torch.distributed.checkpoint), resumed on any number of ranks
    ranks.py       what the trainer asks of its ranks; one process answers trivially
    sharded.py     the answers of several processes
    watchdog.py    names the rank that holds up the others, and ends them all
    restart.py     telling a launcher's own restart from a second start by hand

The rules that keep N ranks equal to one process:

- the *global* batch is drawn and divided into branches first, then every branch is shared over the ranks equally, so
  that all ranks make the same forward passes and issue the same collectives;
- losses are divided by the rows of the global batch, so gradients are summed over ranks, never averaged;
- whatever a decision depends on is reduced first, and taken from rank 0 to the last bit, so that every rank decides
  alike without asking again.
"""
