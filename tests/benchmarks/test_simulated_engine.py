"""The engine model against cases worked out by hand."""

from dataclasses import dataclass, field

import pytest

from benchmarks.sim.engine import Engine, EngineDown, EngineSpec
from benchmarks.sim.prefixes import Work
from benchmarks.sim.virtual_time import VirtualTime

# 1 000 tokens of prompt a second; a step takes 0.10 s and 0.05 s more for each stream.
STEP, STREAM = 0.10, 0.05


def spec(kind="mlx", *, slots=4, cache_tokens=100_000, **more):
    return EngineSpec(
        kind=kind,
        prefill_tokens_per_second=1000,
        step_seconds=STEP,
        stream_seconds=STREAM,
        attention=more.pop("attention", 0.0),
        slots=slots,
        cache_tokens=cache_tokens,
        **more,
    )


def work(prompt=1000, output=11, *, key="", prefix=0, kept=0):
    return Work(key=key or f"{prompt}/{output}", prefix=prefix, prompt=prompt, output=output, kept=kept)


@dataclass
class Client:
    time: VirtualTime
    first: float | None = None
    done: float | None = None
    broken: float | None = None
    moments: list[str] = field(default_factory=list)

    def began(self):
        self.first = self.time.now
        self.moments.append("began")

    def finished(self):
        self.done = self.time.now
        self.moments.append("finished")

    def broke(self):
        self.broken = self.time.now
        self.moments.append("broke")


class Bench:
    def __init__(self, engine_spec):
        self.time = VirtualTime()
        self.engine = Engine(self.time, engine_spec)

    def send(self, asked, at=0.0):
        client = Client(self.time)
        self.time.at(at, lambda: self.engine.submit(asked, client))
        return client

    def run(self, until=1000.0):
        self.time.run(until)


def test_one_request_alone_takes_its_prefill_and_a_step_for_each_further_token():
    bench = Bench(spec())
    alone = bench.send(work(prompt=1000, output=11))
    bench.run()
    assert alone.first == pytest.approx(1.0)
    assert alone.done == pytest.approx(1.0 + 10 * (STEP + STREAM))
    assert alone.moments == ["began", "finished"]


def test_an_answer_of_one_token_ends_with_its_prompt():
    bench = Bench(spec())
    short = bench.send(work(prompt=500, output=1))
    bench.run()
    assert short.first == short.done == pytest.approx(0.5)


def test_two_streams_share_each_step():
    bench = Bench(spec())
    one, two = bench.send(work(1000, 11, key="a")), bench.send(work(1000, 11, key="b"))
    bench.run()
    # The first starts at 1.0 s. The second's prompt is one chunk: one step of 0.15 + 1.0 s, in which the
    # first gets a token. From 2.15 s on both run: nine steps of 0.2 s, then the second's last alone.
    assert one.first == pytest.approx(1.0)
    assert two.first == pytest.approx(2.15)
    assert one.done == pytest.approx(2.15 + 9 * 0.20)
    assert two.done == pytest.approx(2.15 + 9 * 0.20 + 0.15)


def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_others():
    bench = Bench(spec())
    one, two = bench.send(work(1000, 101, key="a")), bench.send(work(6144, 2, key="b"))
    bench.run()
    # Three chunks of 2 048 tokens, and a step of the first with each.
    assert two.first == pytest.approx(1.0 + 6.144 + 3 * 0.15)
    # 97 tokens are left then; of their steps one is shared.
    assert one.done == pytest.approx(two.first + 0.20 + 96 * 0.15)


def test_attention_makes_later_tokens_of_a_prompt_dearer():
    bench = Bench(spec(attention=1e-4))
    one = bench.send(work(2000, 1))
    bench.run()
    assert one.done == pytest.approx(2.0 * (1 + 1e-4 * 1000))


def test_a_step_takes_longer_with_each_token_of_context():
    bench = Bench(spec(context_seconds=1e-4))
    one = bench.send(work(1000, 11))
    bench.run()
    # The context grows from 1 001 to 1 011 tokens: 1 006 on average.
    assert one.done == pytest.approx(1.0 + 10 * (0.15 + 1e-4 * 1006))


@pytest.mark.parametrize("kind", ["vllm", "mlx", "llama.cpp"])
def test_a_prefix_that_is_cached_is_not_read_again(kind):
    bench = Bench(spec(kind))
    bench.send(work(1050, 11, key="paper", prefix=1000, kept=1000))
    later = bench.send(work(1100, 11, key="paper", prefix=1000, kept=1000), at=100.0)
    bench.run()
    assert later.first == pytest.approx(100.0 + 0.1)
    assert bench.engine.prefilled_tokens == 1050 + 100


@pytest.mark.parametrize(("kind", "read"), [("vllm", 1050 + 100), ("mlx", 2150), ("llama.cpp", 2150)])
def test_only_vllm_shares_a_prefix_that_is_still_in_use(kind, read):
    bench = Bench(spec(kind))
    bench.send(work(1050, 500, key="paper", prefix=1000, kept=1000))
    bench.send(work(1100, 11, key="paper", prefix=1000, kept=1000), at=2.0)
    bench.run()
    assert bench.engine.prefilled_tokens == read


def test_a_prompt_that_is_cached_as_a_whole_still_takes_a_step():
    bench = Bench(spec())
    bench.send(work(1000, 2, key="paper", prefix=1000, kept=1000))
    again = bench.send(work(1000, 2, key="paper", prefix=1000, kept=1000), at=100.0)
    bench.run()
    assert again.first == pytest.approx(100.0 + STEP)


@pytest.mark.parametrize("kind", ["vllm", "mlx", "llama.cpp"])
def test_the_least_recently_used_prefix_is_forgotten(kind):
    bench = Bench(spec(kind, slots=1, cache_tokens=2500))
    for number, key in enumerate(["a", "b", "a", "c", "d", "b"]):
        bench.send(work(1010, 2, key=key, prefix=1000, kept=1000), at=100.0 * number)
    bench.run()
    # `a` was found the second time, since two fit; `b` had gone for `c` and `d`.
    assert bench.engine.prefilled_tokens == 5 * 1010 + 10


def test_what_is_sent_beyond_the_slots_waits_in_the_engine():
    bench = Bench(spec(slots=1))
    one, two = bench.send(work(1000, 11, key="a")), bench.send(work(1000, 11, key="b"))
    bench.run()
    assert one.done == pytest.approx(2.5)
    assert two.first == pytest.approx(one.done + 1.0)


def test_what_does_not_fit_into_memory_waits_though_slots_are_free():
    bench = Bench(spec("vllm", cache_tokens=1500))
    one, two = bench.send(work(1000, 11, key="a")), bench.send(work(1000, 11, key="b"))
    bench.run()
    assert two.first == pytest.approx(one.done + 1.0)


def test_one_that_is_cancelled_leaves_its_place_to_the_next():
    bench = Bench(spec(slots=1))
    first, second = Client(bench.time), bench.send(work(1000, 11, key="b"), at=0.1)
    generation = bench.engine.submit(work(1000, 1001, key="a"), first)
    bench.time.at(5.0, lambda: bench.engine.cancel(generation))
    bench.run()
    assert first.moments == ["began"]
    assert second.first == pytest.approx(6.0)


def test_a_crash_breaks_all_that_it_had_and_forgets_every_prefix():
    bench = Bench(spec(slots=1))
    running, waiting = bench.send(work(1000, 101, key="a")), bench.send(work(1000, 11, key="b"))
    bench.time.at(3.0, bench.engine.crash)
    bench.run(until=4.0)
    assert (running.broken, waiting.broken) == (3.0, 3.0)
    with pytest.raises(EngineDown):
        bench.engine.submit(work(), Client(bench.time))
    bench.engine.returns()
    after = bench.send(work(1000, 2, key="a", prefix=900, kept=1000), at=10.0)
    bench.run()
    assert after.first == pytest.approx(11.0)


def test_a_hung_engine_takes_requests_and_goes_on_when_it_returns():
    bench = Bench(spec())
    running = bench.send(work(1000, 11))
    bench.time.at(1.75, bench.engine.hang)  # half of the answer is there
    asked_meanwhile = bench.send(work(1000, 2, key="b"), at=5.0)
    bench.run(until=100.0)
    assert (running.done, asked_meanwhile.first) == (None, None)
    bench.engine.returns()
    bench.run()
    assert running.done > 100.0
    assert asked_meanwhile.first > 100.0


def test_a_slow_engine_takes_so_many_times_as_long_for_what_is_left():
    bench = Bench(spec())
    one = bench.send(work(1000, 11))
    bench.time.at(1.75, lambda: bench.engine.slow(5.0))
    bench.run()
    assert one.done == pytest.approx(1.75 + 5 * 0.75)
