"""Benchmarks: run as ``python -m benchmarks.NAME``; each compares with a peer in one process, interleaved."""
