"""Benchmarks of `pact-fast eval BENCH` (docs/evaluation.md).

benchmark   the Benchmark class and its registry
benchmarks  one file per benchmark
results     finished samples on disk, from which an evaluation continues
statistics  pass@1, pass^k and bootstrap intervals
summary     scores by category, as JSON and as a table
"""
