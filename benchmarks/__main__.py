"""Runs the benchmarks: `python -m benchmarks --help`."""

if __name__ == "__main__":  # child processes import this module too, and should not import torch
    from benchmarks.run import main

    main()
