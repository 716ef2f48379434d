"""Writes `configs/openapi.json` of this checkout anew."""

from __future__ import annotations

from pathlib import Path

from balancer.openapi import published

if __name__ == "__main__":
    (Path(__file__).parents[2] / "configs" / "openapi.json").write_bytes(published())
