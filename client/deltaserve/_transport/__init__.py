"""How a worker's vectors travel: in one message each way, in a stream of chunks, or through shared memory."""
