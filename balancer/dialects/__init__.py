"""Client-side APIs: bytes to asks and back. Pure."""
