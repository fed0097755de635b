"""gRPC: what comes in is checked before anything changes; servicers decode, call and encode."""
