"""How a worker's vectors travel: one message, a stream of chunks, or shared memory."""
