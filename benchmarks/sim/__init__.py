"""A room of machines on virtual time: engines, clients and faults around the real dispatcher.

Everything here is deterministic: the same seed gives the same rows. `benchmarks.simulate` is the command.
"""
