"""Turns every error into one line for the user, and into an exit status."""

import typer

INTERRUPTED = 130
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


def is_interrupt(error: BaseException) -> bool:
    """Returns whether the error is Ctrl+C, which typer may have replaced by an exception of its own."""
    return isinstance(error, KeyboardInterrupt | typer.Abort)


def exit_status(error: Exception) -> int:
    """Returns the exit status of an error: 2 for wrong usage, else 1."""
    return int(getattr(error, "exit_code", 1))


def one_line(error: Exception) -> str:
    """Returns the text of an error as one line."""
    return " ".join(_text(error).split())


def _text(error: Exception) -> str:
    import deltaserve
    from deltaserve_server.recipes.errors import TrainingError

    if isinstance(error, CommandError | TrainingError | deltaserve.Error):
        return str(error)
    # Only recent releases of typer have a common base class for usage errors; all have this method.
    if hasattr(error, "format_message"):
        return _usage(error, error.format_message())
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return f"this needs the package {error.name}: pip install 'deltaserve[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error} (a bug in deltaserve; DELTASERVE_TRACEBACK=1 shows the traceback)"


def _usage(error: Exception, message: str) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "deltaserve"
    plain = message.replace(_LIBRARY_PREFIX, "").rstrip(".")
    return f"{plain}; see {path} --help"
