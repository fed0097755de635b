# One image for servers on a CPU and for workers without torch. `--target cuda` adds torch and Triton, for servers on a GPU.

FROM python:3.11-slim AS base
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin deltaserve \
 # A new volume that is mounted here takes the owner of this folder.
 && install --directory --owner deltaserve --group deltaserve --mode 0700 /var/lib/deltaserve
# The root file system can be read-only: everything is written to /tmp, which can be a tmpfs.
ENV PATH=/opt/deltaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    DELTASERVE_BIND=0.0.0.0:50051
USER deltaserve
WORKDIR /tmp
EXPOSE 50051
# The same check as `deltaserve health`, in a fifth of the processor time, because it runs forever. b"\x08\x01" is SERVING.
HEALTHCHECK --interval=3s --timeout=3s --start-period=300s --retries=3 CMD ["python", "-Ic", "import grpc; \
    exit(grpc.insecure_channel('localhost:50051').unary_unary('/grpc.health.v1.Health/Check')(b'', timeout=2) != b'\\x08\\x01')"]
ENTRYPOINT ["deltaserve"]
CMD ["serve"]

FROM base AS builder
USER root
WORKDIR /src
RUN python -m venv --without-pip /opt/deltaserve
ENV PIP_PYTHON=/opt/deltaserve/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# First install the requirements, with an empty package, so that a change of the source does not install them again.
COPY constraints.txt pyproject.toml ./
RUN mkdir -p client/deltaserve server/deltaserve_server \
 && touch LICENSE README.md client/deltaserve/__init__.py server/deltaserve_server/__init__.py \
 && pip install --constraint constraints.txt '.[server]' scikit-learn
COPY LICENSE README.md ./
COPY client client
COPY server server
RUN pip install --no-deps --force-reinstall . && find /opt/deltaserve -type d -name tests -prune -exec rm -r {} +

FROM base AS runtime
COPY --from=builder /opt/deltaserve /opt/deltaserve

FROM builder AS cuda-builder
RUN pip install --constraint constraints.txt '.[cuda]'

FROM base AS cuda
USER root
# Triton compiles a small launcher for each kernel and needs a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER deltaserve
COPY --from=cuda-builder /opt/deltaserve /opt/deltaserve
ENV TRITON_CACHE_DIR=/var/cache/triton

# The default target.
FROM runtime
