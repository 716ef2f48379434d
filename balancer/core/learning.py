"""What an attempt teaches of its worker and model, as it begins, goes on and ends. Pure.

The values that are learned are in `estimates`; this says what may be learned from what.
"""

from __future__ import annotations

from balancer.core.fleet import Flight
from balancer.core.forecast import Forecast
from balancer.core.model import Measures

PREFILL_CHUNK_TOKENS = 2048
"""An engine says nothing on any stream while it reads one chunk of a prompt."""
MOSTLY = 0.75
"""Of a prompt: an engine that has this much to compute shows its speed, whatever it remembers of the rest."""


def begun(flight: Flight, forecast: Forecast, now: float) -> None:
    """The first token has come."""
    member, speeds = flight.member, flight.member.speeds_of(flight.offer)
    if flight.ticket in member.awaiting:  # nobody has told that its model is loaded; now it is seen
        member.took_to_load(flight.offer.own_name, now - flight.sent - flight.expected)
        member.has_loaded(flight.offer.own_name, now)
    if flight.cold:
        member.began(flight, now)
        _remember_at_once(flight, forecast)
        return
    # Prompts are read one after the other: what was before it is not its own time.
    behind_another = len(member.pending) > 1
    since = flight.reading_from
    seconds = now - (max(since, member.last_first) if behind_another else since)
    member.began(flight, now)
    if flight.uncached > MOSTLY * flight.prompt:  # else an engine that has forgotten would look slow
        before = speeds.prefill_tokens_per_second
        speeds.read(flight.uncached, seconds, alone=member.load == 1)
        flight.taught = speeds.prefill_tokens_per_second / before
    own = flight.uncached / speeds.prefill_tokens_per_second + speeds.answering.at(member.load)
    speeds.began(now - flight.sent, own)
    _remember_at_once(flight, forecast)
    if member.condition is not None and member.condition.slots is None:
        member.limit.began(
            seconds=now - flight.sent,
            expected=flight.expected + (speeds.overhead_seconds or 0.0),
            running=len(member.running),
        )
        member.changed()


def _remember_at_once(flight: Flight, forecast: Forecast) -> None:
    """Where a prefix in use can serve others."""
    if flight.member.shares_prefixes and flight.kind != "probe":
        forecast.remember(flight)


def grown(flight: Flight, tokens: int, now: float) -> None:
    """So many tokens have come until now."""
    if flight.first is None or tokens <= flight.tokens:
        return
    member, more = flight.member, tokens - flight.tokens
    member.last_byte = now
    # Undisturbed by anybody's prompt, and more than what rounding to ticks makes of it.
    if member.last_first <= flight.grew and not member.pending and more > 2 and flight.tokens:
        member.speeds_of(flight.offer).wrote(member.load, (now - flight.grew) / more, 0.05)
    flight.tokens, flight.grew = tokens, now


def answered(flight: Flight, measures: Measures | None, forecast: Forecast, now: float) -> None:
    """The answer is whole; its worker still has it."""
    member, speeds = flight.member, flight.member.speeds_of(flight.offer)
    member.last_byte = now
    speeds.answers += 1
    if measures is None:
        return
    _remember(flight, measures, forecast)
    first = flight.first
    if first is None and measures.first_byte is not None:
        first = flight.sent + measures.first_byte
    if first is None:
        return
    prompt, cached, output = measures.prompt_tokens, measures.cached_tokens, measures.output_tokens
    if prompt and cached is not None:
        if flight.cold:
            pass
        elif flight.taught is None:
            speeds.read(prompt - cached, first - flight.sent, alone=flight.kind == "probe")
        elif prompt - cached < MOSTLY * flight.uncached:
            speeds.prefill_tokens_per_second /= flight.taught  # it remembered more than was known
    if output and output > 8 and not flight.was_held:
        _learn_writing(flight, first, output, now)


def _remember(flight: Flight, measures: Measures, forecast: Forecast) -> None:
    ask, member = flight.ask, flight.member
    prompt = measures.prompt_tokens
    if flight.kind in ("ask", "copy"):
        forecast.sizes(ask.needs.model).counted(ask, prompt, measures.output_tokens)
        if not member.worker.fallback:
            forecast.settle(ask, member.worker.id, (prompt or flight.prompt) + (measures.output_tokens or 0))
    if flight.kind == "probe":
        return
    if prompt and measures.cached_tokens is not None:
        expected = flight.prompt - flight.uncached
        member.remembered_so_much(flight.offer, expected, measures.cached_tokens)
    forecast.remember(flight, tokens=flight.prompt if flight.kind == "warm" else None)


def _learn_writing(flight: Flight, first: float, output: int, now: float) -> None:
    member, speeds = flight.member, flight.member.speeds_of(flight.offer)
    streams = (flight.streams + member.load) / 2
    speeds.answered(streams, (now - first) / (output - 1))
    # While it reads somebody's prompt in chunks, each step takes a chunk longer: that is the prompt's time,
    # and few tokens come in it.
    reading = member.read_for(now) - flight.read_before
    step = PREFILL_CHUNK_TOKENS / speeds.prefill_tokens_per_second + speeds.writing.at(streams)
    tokens, seconds = output - 1 - reading / step, now - first - reading
    if tokens > 8 and seconds > 0.3 * (now - first):
        speeds.wrote(streams, seconds / tokens, 1.0)
