"""What survives a death: snapshots, journals, and how a model comes back from them.

A model has a folder of its own. A snapshot is its whole state at one moment; a journal holds what has happened since,
in order. Whatever a file holds is checked before it is used, and nothing in it is ever executed.
"""
