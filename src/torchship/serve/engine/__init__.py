"""Lines of worker processes: admission, queues, batches, replicas."""
