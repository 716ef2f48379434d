"""Asking an agent or a balancer for a chat answer as a stream, and all that came of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"


@dataclass
class Told:
    """One streamed answer, as it comes."""

    events: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    usages: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Their codes."""
    seams: list[int] = field(default_factory=list)
    """Where another worker went on: how many characters had come."""
    workers: list[str] = field(default_factory=list)
    """Which worker the balancer says that it is from."""
    done: bool = False

    def take(self, line: bytes) -> None:
        """One line of the stream."""
        if line == b": continued\n":
            self.seams.append(len(self.text))
        elif line == b"data: [DONE]\n":
            self.done = True
        elif line.startswith(b"data: "):
            assert not self.done
            self.take_event(json.loads(line.removeprefix(b"data: ")))

    def take_event(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.errors.append(event["error"]["code"])
            return
        self.events.append(event)
        if usage := event.get("usage"):
            self.usages.append(usage)
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            self.pieces += [delta["content"]] if delta.get("content") else []
            self.roles += [delta["role"]] if delta.get("role") else []
            self.finish_reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def usage(self) -> dict[str, Any]:
        """The only one."""
        [usage] = self.usages
        return usage


def question(model: str, text: str, tokens: int, begun: str | None = None) -> dict[str, Any]:
    """A request without chance, streamed; `begun`: how its answer begins."""
    messages = [{"role": "user", "content": text}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    return {
        "model": model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(
    client: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    answer: Told | None = None,
) -> Told:
    """The whole answer; `answer` can be looked at while it comes. Fails for any status but 200."""
    answer = Told() if answer is None else answer
    async with client.post(url + CHAT, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        if worker := response.headers.get("X-Balancer-Worker"):
            answer.workers.append(worker)
        async for line in response.content:
            answer.take(line)
    return answer
