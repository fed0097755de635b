"""Training recipes: small, real training runs with a process for each worker.

A recipe (`digits.py`, `airfoil.py`) names the data, the network and the settings. `training.py` starts a process for
each worker, and `worker.py` runs in it. Nothing here writes to the terminal; callers get progress through an observer.
"""
