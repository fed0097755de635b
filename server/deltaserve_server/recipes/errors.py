"""Why a training run cannot start or continue. Each text is one line for the user that says what to do."""


class TrainingError(Exception):
    """A run cannot start or continue."""


class DataError(TrainingError):
    """The data is missing, or is not what the recipe needs."""


class MissingPackageError(TrainingError):
    """A recipe needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package}: pip install 'deltaserve[{extra}]'")


class WorkerError(TrainingError):
    """A worker ended before it finished its job."""
