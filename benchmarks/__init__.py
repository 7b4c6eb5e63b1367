"""Benchmarks: each prints JSON and a table, compares in one run, interleaved, as ratios."""
