"""`deltaserve health`: for health checks of containers, so it must be quick."""

import typer

from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, TargetArgument


def health(
    target: TargetArgument = DEFAULT_TARGET,
    timeout: float = typer.Option(2.0, min=0.01, metavar="SECONDS", help="How long to wait for the answer."),
) -> None:
    """Ask a server whether it serves: exit status 0 or 1."""
    status = check(target, timeout)
    if status != "SERVING":
        raise CommandError(f"the server at {target} answers {status}: wait until it has started, or look into its log")
    typer.echo(status)


def check(target: str, timeout_seconds: float) -> str:
    """Asks grpc.health.v1 about the whole server.

    Returns:
        The status, as `SERVING`.

    Raises:
        CommandError: no answer, or one that no such server gives.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise CommandError(
                f"{target} does not answer ({error.code().name}): is the server running there?"
            ) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
