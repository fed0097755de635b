"""One servicer for each gRPC service: decode, call, encode."""
