"""`balancer up`, as a new user meets it: the real command, the real engine, the real model."""

import asyncio
import json
import shlex
import shutil
import signal
import stat
import sys
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.e2e.conftest import free_port
from tests.e2e.processes import command

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

STARTED = "Ctrl-C stops everything."
ANSWERED = "/v1/chat/completions smollm2-135m-instruct 200"


def up(tmp_path: Path, port: int, *more: str, **variables: str):
    """The command of the README; one thread, since other tests want a core too."""
    return command(
        *("balancer", "up", "--port", str(port), "--no-mdns", "--data-dir", str(tmp_path / "data")),
        *("--threads", "1", *more),
        output=tmp_path / "output.txt",
        home=tmp_path,
        **variables,
    )


def below(text: str, heading: str) -> str:
    """What stands under a heading of the welcome, up to the next blank line."""
    return text.split(f"\n{heading}\n", 1)[1].split("\n\n", 1)[0]


async def test_what_it_prints_works_as_pasted_and_ctrl_c_leaves_nothing(tmp_path):
    port = free_port()
    async with up(tmp_path, port) as running:
        await running.until_it_says(STARTED)
        assert len(running.look()) >= 4  # itself, the agent, the guard, the engine
        text = running.text()
        assert f"http://127.0.0.1:{port}/v1" in below(text, "Endpoint")

        if shutil.which("curl"):
            said = await output_of("bash", "-c", below(text, "Try it").replace("curl ", "curl -sN "))
            assert said.rstrip().endswith("data: [DONE]")
            assert '"content":' in said
        said = await output_of(sys.executable, "-c", below(text, "From Python (pip install openai)"))
        assert said.strip()

        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": "Count from one to five."}],
                max_tokens=12,
                stream=True,
            )
            words = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            assert len("".join(words).strip()) > 3

        running.send(signal.SIGINT)
        assert await running.ended() == 0
        await running.until_nothing_is_left()


async def test_with_a_certificate_of_its_own_what_it_prints_works_as_pasted_too(tmp_path):
    folder = tmp_path / "somebody's own"
    folder.mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "agent.log").touch(0o644)
    port = free_port()
    async with up(folder, port, BALANCER_TLS="self-signed") as running:
        await running.until_it_says(STARTED)
        text = running.text()
        assert f"https://127.0.0.1:{port}/v1" in below(text, "Endpoint")
        if shutil.which("curl"):
            said = await output_of("bash", "-c", below(text, "Try it").replace("curl ", "curl -sN ", 1))
            assert said.rstrip().endswith("data: [DONE]")
        said = await output_of(sys.executable, "-c", below(text, "From Python (pip install openai)"))
        assert said.strip()
        assert stat.S_IMODE((folder / "data" / "agent.log").stat().st_mode) == 0o600


async def test_where_keys_are_asked_for_what_it_prints_makes_one_first(tmp_path):
    port = free_port()
    async with up(tmp_path, port, BALANCER_AUTH="keys") as running:
        await running.until_it_says(STARTED)
        text = running.text()
        make = below(text, "A key, first of all").replace(
            "uv run balancer", f"{shlex.quote(sys.executable)} -m balancer"
        )
        python = shlex.quote(below(text, "From Python (pip install openai)"))
        lines = [f"export BALANCER_DATA_DIR={shlex.quote(str(tmp_path / 'data'))}", make]
        lines.append(f"{shlex.quote(sys.executable)} -c {python} && echo ANSWERED")
        if shutil.which("curl"):
            lines.append(below(text, "Try it").replace("curl ", "curl -sN ", 1))
        else:
            lines.append("echo 'data: [DONE]'")
        said = await output_of("bash", "-c", "\n".join(lines))
        assert "ANSWERED" in said
        assert said.rstrip().endswith("data: [DONE]")


async def test_ctrl_c_during_the_start_leaves_nothing(tmp_path):
    async with up(tmp_path, free_port()) as running:
        await running.until_it_says("loads its model")
        assert len(running.look()) >= 2
        running.send(signal.SIGINT)
        assert await running.ended() == 0
        await running.until_nothing_is_left()


async def test_ctrl_c_lets_an_answer_finish_and_a_second_one_does_not(tmp_path):
    """An answer of 600 tokens is under way; the one that is asked politely is awaited, the other cut."""
    for polite in (True, False):
        port = free_port()
        folder = tmp_path / str(polite)
        folder.mkdir()
        async with up(folder, port) as running:
            await running.until_it_says(STARTED)
            running.look()
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as client:
                stream = await client.chat.completions.create(
                    model="smollm2-135m-instruct",
                    messages=[{"role": "user", "content": "Write a long story about a tree."}],
                    max_tokens=60 if polite else 4000,
                    stream=True,
                )
                await anext(stream)
                running.send(signal.SIGINT)
                await running.until_it_says("finishing 1 request")
                if polite:
                    chunks = [chunk async for chunk in stream]
                    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
                else:
                    running.send(signal.SIGINT)
                assert await running.ended() == 0
                await running.until_nothing_is_left()


async def test_killed_without_a_word_it_takes_agent_and_engine_with_it(tmp_path):
    async with up(tmp_path, free_port()) as running:
        await running.until_it_says(STARTED)
        assert len(running.look()) >= 4
        running.send(signal.SIGKILL)
        await running.ended()
        await running.until_nothing_is_left()


async def test_an_agent_that_is_killed_is_started_again(tmp_path):
    port = free_port()
    async with up(tmp_path, port) as running, aiohttp.ClientSession() as http:
        await running.until_it_says(STARTED)
        agent = next(p for p in running.look() if "worker_agent" in p.cmdline() and "run" in p.cmdline())
        agent.kill()
        await running.until_it_says("it is started again")
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 4,
        }
        async with http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
            assert response.status == 200
        running.look()
        running.send(signal.SIGINT)
        assert await running.ended() == 0
        await running.until_nothing_is_left()


async def test_a_paper_batch_makes_reports_and_a_second_run_asks_nothing(tmp_path):
    """The main job on a real paper with the real model."""
    papers, out, port = tmp_path / "papers", tmp_path / "results", free_port()
    papers.mkdir()
    source = Path(__file__).parents[2] / "docs" / "papers" / "spiceypy.txt"
    (papers / "short.txt").write_text(source.read_text()[:1200])
    (papers / "broken.pdf").write_bytes(b"this is no PDF")
    preset = {
        "name": "tiny",
        "description": "One short question.",
        "prompts": [{"name": "gist", "text": "What is it about?", "max_tokens": 12, "temperature": 0}],
    }
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "tiny.json").write_text(json.dumps(preset))
    words = (
        *("balancer", "batch", "run", str(papers), "--preset", "tiny"),
        *("--presets", str(tmp_path / "presets"), "--out", str(out)),
    )
    async with up(tmp_path, port) as running:
        await running.until_it_says(STARTED)
        for run in (1, 2):
            async with command(
                *words,
                output=tmp_path / f"batch-{run}.txt",
                home=tmp_path,
                BALANCER_URL=f"http://127.0.0.1:{port}",
            ) as batch:
                assert await batch.ended(within=90) == 1, batch.text()  # one of two papers failed
            rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
            assert [(Path(row["file"]).name, row["status"]) for row in rows] == [
                ("broken.pdf", "failed"),
                ("short.txt", "completed"),
            ]
            assert rows[1]["answers"]["gist"].strip()
            assert "## Gist" in (out / "short.md").read_text()
            await running.until_it_says(ANSWERED)
            assert running.text().count(ANSWERED) == 1
        running.look()


async def test_a_port_that_is_taken_is_said_in_a_sentence(tmp_path):
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with up(tmp_path, port, "--host", "127.0.0.1") as running:
            assert await running.ended() == 1
            assert "Choose another port with --port" in running.text()
            assert "Traceback" not in running.text()


async def test_a_model_that_is_not_there_is_said_in_a_sentence(tmp_path):
    async with up(tmp_path, free_port(), "--model", str(tmp_path / "nothing.gguf")) as running:
        assert await running.ended() == 1
        assert "nothing.gguf" in running.text()
        assert "Traceback" not in running.text()
        await running.until_nothing_is_left()


async def output_of(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(120):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_a_folder_that_cannot_be_written_to_is_said_in_a_sentence(tmp_path):
    taken = tmp_path / "data"
    taken.write_text("a file where a folder should be")
    async with up(tmp_path, free_port()) as running:
        assert await running.ended() == 1
        assert "choose another --data-dir" in running.text()
        assert "Traceback" not in running.text()
        await running.until_nothing_is_left()
