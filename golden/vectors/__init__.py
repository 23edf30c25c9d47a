"""Conformance vectors: the golden model's behaviour as files that need none of our code to read."""
