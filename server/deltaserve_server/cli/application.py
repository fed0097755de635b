"""Assembles the commands."""

from typing import Annotated, Any

import typer

from deltaserve_server.cli import doctor, health, models, pull, serve, snapshots, train, transfer, update, watch

HELP = """An optimizer as a service: a server holds a model's weights and optimizer state; workers push gradients and
get the new weights back.

Try it with [bold]deltaserve train digits[/]. Start a server with [bold]deltaserve serve[/]."""


def command() -> Any:
    """Returns the command line as a click command."""
    application = typer.Typer(
        help=HELP,
        rich_markup_mode="rich",
        add_completion=False,  # keeps --install-completion and --show-completion out of the help
        pretty_exceptions_enable=False,  # errors are one line, see `cli.run`
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # The help lists the commands in this order.
    application.callback(invoke_without_command=True)(start)
    application.command()(serve.serve)
    application.add_typer(train.application, name="train")
    for function in (models.models, models.status, watch.watch, update.update, snapshots.snapshots, pull.pull):
        application.command()(function)
    application.command()(transfer.export)
    application.command("import")(transfer.import_)
    application.command()(models.delete)
    for function in (health.health, doctor.doctor):
        application.command()(function)
    return typer.main.get_command(application)


def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Prints the version, or the help if no command is given."""
    if version:
        from deltaserve import __version__

        typer.echo(f"deltaserve {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
