"""Several processes: who they are, replicated and sharded weights, checkpoints of many processes."""
