"""Turns every error into one line for the user, and into an exit status."""

INTERRUPTED = 130  # what shells report after SIGINT: 128 + 2
_LIBRARY_PREFIX = "Value error, "
"""What recent releases of typer put before some messages."""

EXTRAS = {  # by package: the extra that installs it
    "torch": "torch",
    "triton": "cuda",
    "sklearn": "train",
    "matplotlib": "train",
    "numba": "server",
    "grpc_reflection": "server",
    "safetensors": "server",
    "crc32c": "server",
    "fsspec": "server",
    "msgspec": "server",
}


class CommandError(Exception):
    """A command failed. The text is one line for the user, with what to do."""


class UsageError(CommandError):
    """The command line is wrong; exit status 2."""

    exit_code = 2


def one_line(error: Exception) -> str:
    """Returns the text of an error as one line."""
    return " ".join(_text(error).split())  # names and messages of other libraries may have line breaks


def _text(error: Exception) -> str:
    import deltaserve
    from deltaserve_server.recipes.errors import TrainingError

    if isinstance(error, CommandError | TrainingError | deltaserve.Error):
        return str(error)
    # Only recent releases of typer have a common base class for usage errors; all have this method.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)  # an error of the top level has none
        path = context.command_path if context else "deltaserve"
        return f"{error.format_message().replace(_LIBRARY_PREFIX, '').rstrip('.')}; see {path} --help"
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return f"this needs the package {error.name}: pip install 'deltaserve[{extra}]'"
    if isinstance(error, OSError) and error.strerror:  # its str() begins with a number
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error} (a bug in deltaserve; DELTASERVE_TRACEBACK=1 shows the traceback)"
