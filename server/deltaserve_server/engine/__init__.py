"""What runs models: the lock, the state machine, the vectors, and who is told of what. No gRPC, no protobuf."""
