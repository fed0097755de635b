"""Every error as one line that says what to do, and its exit status."""

import typer

INTERRUPTED = 130
_OF_A_LIBRARY = "Value error, "
"""What typer's newest releases leave in front of some messages."""

EXTRAS = {
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
    """A command cannot do what it was asked to. The text is one line for the user."""


class UsageError(CommandError):
    """The command was not given as it must be; exit status 2."""

    exit_code = 2


def is_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl+C, in its own shape or in the one that typer's releases give it."""
    return isinstance(error, KeyboardInterrupt | typer.Abort)


def exit_status(error: Exception) -> int:
    """Returns 2 for wrong usage, else 1."""
    return int(getattr(error, "exit_code", 1))


def one_line(error: Exception) -> str:
    """Returns what to tell the user."""
    return " ".join(_text(error).split())


def _text(error: Exception) -> str:
    import deltaserve
    from deltaserve_server.recipes.errors import TrainingError

    if isinstance(error, CommandError | TrainingError | deltaserve.Error):
        return str(error)
    # typer's usage errors have a common base only in its newest releases; all have this method.
    if hasattr(error, "format_message"):
        return _usage(error, error.format_message())
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return f"this needs {error.name}: pip install 'deltaserve[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error} (a fault of deltaserve; DELTASERVE_TRACEBACK=1 shows where)"


def _usage(error: Exception, message: str) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "deltaserve"
    plain = message.replace(_OF_A_LIBRARY, "").rstrip(".")
    return f"{plain}; see {path} --help"
