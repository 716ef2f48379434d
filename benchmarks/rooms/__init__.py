"""Rooms that the benchmarks measure: a crowded one on virtual time, and a small one of real engines."""
