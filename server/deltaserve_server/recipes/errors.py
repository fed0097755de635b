"""What can go wrong in a training run, said in one line that tells what to do."""


class TrainingError(Exception):
    """A run cannot start or go on. The text is one line for the user."""


class DataError(TrainingError):
    """The data is not there, or is not what it should be."""


class MissingPackageError(TrainingError):
    """A recipe needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: pip install 'deltaserve[{extra}]'")


class WorkerError(TrainingError):
    """A worker ended before its work was done."""
