"""Measurements of the balancer, each a program: `python -m benchmarks.overhead`."""
