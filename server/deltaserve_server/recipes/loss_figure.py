"""Draws the loss against the epoch, as the figure in the book."""

from collections.abc import Sequence
from pathlib import Path

from deltaserve_server.recipes.errors import MissingPackageError, TrainingError


def check(file: Path) -> None:
    """Raises before the training what would prevent the figure after it.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TrainingError: The folder does not exist, or matplotlib does not write files of this format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        raise MissingPackageError("matplotlib", "train") from error
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if file.suffix.lstrip(".").lower() not in formats:
        raise TrainingError(f"cannot write a figure named {file.name}: end the name with one of {', '.join(formats)}")
    if not file.absolute().parent.is_dir():
        raise TrainingError(f"cannot write {file}: the folder {file.parent} does not exist")


def draw(curve: Sequence[tuple[float, float]], epochs: int, file: Path) -> None:
    """Draws the figure, its axes limited as in the book.

    Args:
        curve: Pairs of epoch and loss, in the order of measurement.
        epochs: The right end of the x axis.
        file: The file to write; its suffix selects the format.

    Raises:
        TrainingError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which may look for a display

    figure = Figure(figsize=(3.5, 2.5), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss", xlim=(0, epochs), ylim=(0.22, 0.35))
    axes.plot([epoch for epoch, _ in curve], [loss for _, loss in curve])
    axes.grid(visible=True)
    try:
        figure.savefig(file)
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error
