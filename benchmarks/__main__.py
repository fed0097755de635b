"""Runs the benchmarks: `python -m benchmarks --help`."""

if __name__ == "__main__":  # processes that are started import this module too, and are not to import torch with it
    from benchmarks.run import main

    main()
