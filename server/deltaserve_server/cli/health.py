"""`deltaserve health`: the health check of containers, which must be quick."""

import typer

from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, TargetArgument


def health(
    target: TargetArgument = DEFAULT_TARGET,
    timeout: float = typer.Option(2.0, min=0.01, metavar="SECONDS", help="How long to wait for an answer."),
) -> None:
    """Check whether a server is serving: exit status 0 or 1."""
    status = check(target, timeout)
    if status != "SERVING":
        raise CommandError(f"the server at {target} answers {status}: wait until it has started, or read its log")
    typer.echo(status)


def check(target: str, timeout_seconds: float) -> str:
    """Calls the gRPC health service for the whole server.

    Returns:
        The name of the status: `SERVING` or another one.

    Raises:
        CommandError: No answer, or an answer that no deltaserve server gives.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    # A proxy from the environment would answer in place of the server.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise CommandError(f"{target} does not answer ({error.code().name}): is a server running there?") from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
