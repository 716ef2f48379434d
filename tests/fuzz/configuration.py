"""The JSON file that people edit."""

from __future__ import annotations

from balancer.config_file import ConfigFaults, parse
from tests.fuzz.target import Target, pure


def config(data: bytes) -> None:
    """Read, or refused with places that are in the text."""
    text = data.decode("utf-8", "replace")
    try:
        parse(text, "room.json")
    except ConfigFaults as refused:
        assert refused.faults
        lines = text.removeprefix("\ufeff").split("\n")
        for fault in refused.faults:
            assert str(fault)
            assert fault.place is not None
            assert 1 <= fault.place.line <= len(lines)
            assert 1 <= fault.place.column <= len(lines[fault.place.line - 1]) + 2


TARGETS = (
    Target(
        "config",
        pure(config),
        (
            *(
                b'"workers": [',
                b'{"id": "a", "host": "h"}',
                b'"port": 1',
                b'"type": "agent"',
                b"// c\n",
                b"/* */",
            ),
            *(
                b'"api_key": {"env": "K"}',
                b'"models": {"a": "b"}',
                b'"allow_networks": ["10.0.0.0/8"]',
                b"'a'",
            ),
            *(
                b'"scorer_weights": {"x": 1}',
                b'"url": "https://h/v1"',
                b'"fallback": true',
                b'"host": "[::1]"',
            ),
            *(
                b'"cors_origins": ["*"]',
                b'"policy": "round_robin"',
                b'"tls": false',
                b"True",
                b"None",
                b"yes",
            ),
        ),
    ),
)
