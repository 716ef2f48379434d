"""The overhead benchmark: the cheap mock, the load, the agent's hop, and what becomes of a missing rival."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager

import orjson
import pytest
from agent.meeting import meet_process, within_sessions

from benchmarks import overhead, rivals
from benchmarks.mock_worker import MODEL, STREAM_EVENTS
from benchmarks.overhead import Effort, LoadFailed, Subject, direct, load, measure, mock_workers, rival, row
from benchmarks.processes import Cores, NotReady, free_ports, started
from benchmarks.static_agent import KEY

ANYWHERE = Cores(None, None)
BRIEF = Effort(rounds=1, flood_seconds=0.1, rate_seconds=0.1, streams_each=1, held=3)


async def test_whole_answers_and_streams_of_every_mock_are_counted(tmp_path):
    async with mock_workers(2, ANYWHERE, tmp_path) as ports:
        for port in ports:
            url = f"http://127.0.0.1:{port}"
            flooded = await load(url, ANYWHERE, "flood", "--connections=2", "--seconds=0.1")
            rated = await load(url, ANYWHERE, "rate", "--per-second=50", "--seconds=0.1")
            streamed = await load(url, ANYWHERE, "streams", "--at-once=2", "--each=2")
            assert flooded.requests > 0
            assert len(rated.latencies_ms) == rated.requests == 5
            assert (streamed.requests, streamed.events) == (4, 4 * STREAM_EVENTS)


async def test_a_load_on_nothing_gives_no_figures():
    (port,) = free_ports(1)
    with pytest.raises(LoadFailed):
        await load(f"http://127.0.0.1:{port}", ANYWHERE, "flood", "--connections=1", "--seconds=0.1")


async def test_streams_are_held_open_until_memory_was_read(tmp_path):
    async with mock_workers(1, ANYWHERE, tmp_path) as (port,):
        arguments = (sys.executable, "-m", "benchmarks.mock_worker")
        async with started(arguments, tmp_path / "words") as something:
            subject = Subject(target="x", url=f"http://127.0.0.1:{port}", started=(something,))
            await overhead._memory(subject, BRIEF, ANYWHERE)
            assert subject.rss_1000_mb is not None
            assert subject.rss_1000_mb > 0


async def test_an_agents_gateway_stands_before_each_mock(tmp_path):
    async with mock_workers(2, ANYWHERE, tmp_path) as ports:
        engines = [word for port in ports for word in ("--engine", str(port))]
        agents = (sys.executable, "-m", "benchmarks.static_agent", *engines)
        async with overhead._saying_its_ports(agents, tmp_path / "agent.log", None) as (_, agent_ports):
            chat = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "go on"}]}
            async with within_sessions() as client:
                for port in agent_ports:
                    await asyncio.to_thread(meet_process, port, KEY)
                    url = f"https://127.0.0.1:{port}/v1/chat/completions"
                    async with client.post(url, json=chat) as answer:
                        assert (await answer.read()).count(b"data: {") == STREAM_EVENTS


async def test_a_process_that_ends_is_not_waited_for(tmp_path):
    async def never() -> bool:
        return False

    async with started((sys.executable, "-c", "print('alas'); exit(3)"), tmp_path / "words") as one:
        with pytest.raises(NotReady, match=r"ended with 3: alas"):
            await one.ready(never, 30.0)


async def test_a_rival_that_is_not_there_is_left_out_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "CACHE", tmp_path)
    one = rivals.Rival(
        name="nobody",
        package="nobody",
        program="no-such-program",
        launch=lambda place: rivals.Launch(argv=()),
    )
    monkeypatch.setattr(overhead.rivals, "program_of", lambda one: original(one, tmp_path))
    outcome = await measure(BRIEF, {"direct": direct, "nobody": rival(one)}, 1)
    assert [row["target"] for row in outcome.rows] == ["direct"]
    assert "--install" in outcome.left_out["nobody"]


original = rivals.program_of


async def test_a_way_that_gives_wrong_answers_is_left_out_with_its_reason():
    @asynccontextmanager
    async def wrong(stage):
        (port,) = free_ports(1)
        yield Subject(target="wrong", url=f"http://127.0.0.1:{port}")

    outcome = await measure(BRIEF, {"direct": direct, "wrong": wrong}, 1)
    assert [row["target"] for row in outcome.rows] == ["direct"]
    assert outcome.left_out["wrong"]


def test_what_a_way_adds_is_counted_from_the_way_without_it():
    floor = Subject(target="direct", url="", requests_per_s=[9.0], latencies_ms=[1.0, 1.0, 1.0])
    ours = Subject(
        target="balancer",
        url="",
        started=(object(),),
        requests_per_s=[1.0, 3.0, 2.0],
        core_percent=[50.0],
        cpu_us_per_request=[40.0],
        cpu_us_per_chunk=[20.0],
        latencies_ms=[1.5, 1.5, 1.5],
    )
    figures = row(ours, floor)
    assert figures["requests_per_s"] == 2.0
    assert figures["added_p50_ms"] == pytest.approx(0.5)
    assert row(floor, floor)["cpu_us_per_request"] is None


def test_every_rival_is_told_of_every_worker(tmp_path):
    place = rivals.Place(
        program=tmp_path / "bin" / "program",
        port=1,
        spare_port=2,
        workers=(20_001, 20_002),
        folder=tmp_path,
    )
    for one in rivals.RIVALS:
        launch = one.launch(place)
        files = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
        told = " ".join(launch.argv) + files
        assert launch.beside is not None or all(str(port) in told for port in place.workers), one.name
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_name_that_nobody_has_is_said_with_the_names_there_are():
    with pytest.raises(SystemExit, match="direct, balancer"):
        overhead.main(["--only", "nonesuch"])


def test_the_result_file_names_its_figures_as_agreed(tmp_path, monkeypatch):
    async def measured(*_):
        return overhead.Outcome([row(floor, floor)], {"nobody": "it is not here"})

    floor = Subject(target="direct", url="", requests_per_s=[9.0], latencies_ms=[1.0, 1.0])
    monkeypatch.setattr(overhead, "measure", measured)
    overhead.main(["--quick", "--json", str(tmp_path / "rows.json")])
    written = orjson.loads((tmp_path / "rows.json").read_bytes())
    agreed = {
        *("target", "requests_per_s", "cpu_us_per_request", "cpu_us_per_chunk"),
        *("added_p50_ms", "added_p99_ms", "rss_idle_mb", "rss_1000_mb"),
    }
    assert agreed <= written["rows"][0].keys()
    assert written["about"]["left out: nobody"] == "it is not here"
