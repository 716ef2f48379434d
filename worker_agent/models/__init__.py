"""Models on this machine: what is there, how it gets there, how it goes."""
