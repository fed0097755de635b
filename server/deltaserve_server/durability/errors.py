"""What can be wrong with a data directory."""


class DataDirectoryError(Exception):
    """A data directory cannot be used; the text is one line that says why, and what to do."""


class CorruptError(Exception):
    """A file does not hold what was written.

    Args:
        where: The file.
        what: What is wrong with it.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what
