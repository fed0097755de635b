"""Durability: snapshots, journals, and the recovery of models from them.

Each model has a folder. A snapshot is the whole state at one moment; a journal has every change since, in order. Every
file is checked before it is used, and nothing in a file is ever executed.
"""
