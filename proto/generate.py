"""Generates the Python stubs from the .proto files: `python proto/generate.py`, or `--check` to compare only.

The generators are old on purpose: generated code refuses a runtime that is older than its generator, and workers run in
crowded environments (see docs/decisions/0001-stubs.md). These generators need protobuf < 6, so `make proto` gives them
a separate environment.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
STUBS = SOURCES.parent / "client" / "deltaserve" / "v1"


def generate(target: Path) -> None:
    """Writes the stubs of every .proto file to `target`, in the folder deltaserve/v1/."""
    protos = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={SOURCES}"),
            f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
            *(f"--python_out={target}", f"--mypy_out=quiet:{target}", *protos),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> int:
    """Generates or compares the stubs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; fail if the committed stubs differ")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        generated = Path(folder) / "deltaserve" / "v1"
        names = {path.name for path in generated.iterdir()}
        committed = {path.name for path in STUBS.glob("*_pb2*")}
        _, differing, missing = filecmp.cmpfiles(generated, STUBS, names, shallow=False)
        stale = sorted({*differing, *missing, *(committed - names)})
        if check:
            for name in stale:
                print(f"client/deltaserve/v1/{name} differs from proto/: run `make proto`", file=sys.stderr)
            return 1 if stale else 0
        STUBS.mkdir(parents=True, exist_ok=True)
        for name in committed - names:
            (STUBS / name).unlink()
        for name in names:
            (STUBS / name).write_bytes((generated / name).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
