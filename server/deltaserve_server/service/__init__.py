"""gRPC: servicers decode a request, call the engine and encode the answer. Input is checked before anything changes."""
