"""What the logs say: spikes of one run, arms of a study, and a report a paper could print. Needs neither torch nor ray.

Statistics are chosen for what studies of training runs are: few seeds (5–20), some runs that diverge (their
quality is infinitely bad, their time known) and arms in which nothing or everything diverges. Every interval is
checked by simulation at such sizes (``python -m analysis.coverage``; the tests run a part of it).
"""
