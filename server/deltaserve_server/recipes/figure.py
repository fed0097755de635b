"""The book's figure: loss against epoch."""

from collections.abc import Sequence
from pathlib import Path

from deltaserve_server.recipes.errors import MissingPackageError, TrainingError


def check(file: Path) -> None:
    """Says before the training, rather than after it, that the figure could not be drawn or written.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TrainingError: the folder is missing, or matplotlib does not write such a format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        raise MissingPackageError("matplotlib", "train") from error
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if file.suffix.lstrip(".").lower() not in formats:
        raise TrainingError(f"cannot draw {file.name}: end its name with one of {', '.join(formats)}")
    if not file.absolute().parent.is_dir():
        raise TrainingError(f"cannot draw {file}: there is no folder {file.parent}")


def draw(curve: Sequence[tuple[float, float]], epochs: int, file: Path) -> None:
    """Draws the figure with the book's limits.

    Args:
        curve: (epoch, loss) in the order they were measured.
        epochs: Right end of the axis.
        file: Where to write; the suffix says the format.

    Raises:
        TrainingError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 2.5), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss", xlim=(0, epochs), ylim=(0.22, 0.35))
    axes.plot([epoch for epoch, _ in curve], [loss for _, loss in curve])
    axes.grid(visible=True)
    try:
        figure.savefig(file)
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error
