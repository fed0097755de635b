"""Training recipes: small, real runs of the service with worker processes of their own.

A recipe (`digits`, `airfoil`) says what is learned from which data; `run` starts the workers, watches them and stops
all that it started. Nothing here knows of a terminal: what happens is told to an `Observer`.
"""
