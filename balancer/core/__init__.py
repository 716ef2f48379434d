"""The pure core: what is known of the room, and what follows from it.

Nothing below this package asks a clock, a socket, a file, a logger or a die; those are arguments. So
production, the property tests and the simulator run the same code.
"""
