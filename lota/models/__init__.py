"""Models on disk and in memory: loading, scope, names, tensors in files, hashes."""
