"""Ablation studies: designs over twinrl's configurations, run by Ray Tune, remembered in a ledger.

study.py        a study's YAML: factors, levels, design, seeds, resources
design.py       grid, one factor at a time, two-level fractional factorials, explicit arms
fingerprint.py  what decides a trial's numbers besides its configuration and seed
ledger.py       one line for each finished trial; append-only, mergeable
plan.py         arms and trials of a study, what is done, what the rest costs
trial.py        one trial: train or resume its run directory to the end, then write one line
runner.py       Ray Tune over what the ledger lacks
margin.py       largest healthy learning rate, by bisection over trials
table.py        what a person sees while trials run, and after
publish.py      the MLflow view: study → arm → seed; summary.py: an arm's median, band and extremes
versions.py     whose trials a report shows after an update of the code
cluster.py      Ray, started here or joined; lifeline.py: a trial ends with whoever started it
"""
