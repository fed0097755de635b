"""Other ways to a parameter server, each in an environment of its own, by turns with deltaserve: `make bench-peers`.

A module a peer, all with one command line: `python -m benchmarks.peers.NAME --workload a --variant V` prints a line of
JSON. A step is the same for all: the whole gradient goes to the server, which makes one Adadelta update, and then the
whole new weights are in the worker's memory.
"""
