"""Other parameter servers, measured in turns with deltaserve, each in its own environment: `make bench-peers`.

Each peer has a module with the same command line: `python -m benchmarks.peers.NAME --workload a --variant V` prints one
line of JSON. A step is the same for all: the whole gradient goes to the server, which makes one Adadelta update, and
the whole new weights arrive in the worker's memory.
"""
