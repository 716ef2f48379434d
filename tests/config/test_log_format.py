"""A log line, for people and for programs: one of its own for each record, and nothing of a request in it."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.log_format import (
    MAX_FIELD_BYTES,
    Ids,
    LogFormat,
    current_request,
    exception_lines,
    formatter,
    harmless,
)

CANARY = "canary-7f3a"


class Log:
    """A logger of its own, and what it has written."""

    def __init__(self, kind: LogFormat, name: str = "balancer.test") -> None:
        self._out = io.StringIO()
        handler = logging.StreamHandler(self._out)
        handler.addFilter(Ids())
        handler.setFormatter(formatter(kind))
        self.logger = logging.Logger(name, logging.DEBUG)
        self.logger.addHandler(handler)

    @property
    def lines(self) -> list[str]:
        return self._out.getvalue().split("\n")[:-1]


@pytest.mark.parametrize("kind", ["text", "json"])
@given(
    words=st.text(max_size=300) | st.sampled_from(["a\r\nERROR forged", "\x1b[31mred", "\u202eevil", "\0"])
)
def test_whatever_comes_from_the_network_stays_in_one_printable_line(kind, words):
    log = Log(kind)
    log.logger.info("%s was sent", words)
    (line,) = log.lines
    assert line.isprintable()
    if kind == "json":
        message = json.loads(line)["message"]
        assert message.isprintable()
        assert message.endswith(" was sent")


@given(st.text(max_size=5000))
def test_a_field_is_bounded_and_plain_text_is_left_as_it_is(text):
    assert len(harmless(text).encode()) <= MAX_FIELD_BYTES
    if text.isprintable() and len(text.encode()) <= MAX_FIELD_BYTES:
        assert harmless(text) == text


def test_a_line_for_programs_has_time_level_logger_message_request_and_fields():
    log = Log("json")
    token = current_request.set("req-1")
    try:
        log.logger.warning(
            "went %s", "well", extra={"fields": lambda: {"status": 200, "worker": "a\n", "big": 2**70}}
        )
    finally:
        current_request.reset(token)
    body = json.loads(log.lines[0])
    assert datetime.fromisoformat(body.pop("ts")).utcoffset().total_seconds() == 0
    assert body == {
        "level": "WARNING",
        "logger": "balancer.test",
        "message": "went well",
        "request_id": "req-1",
        "status": "200",  # the number that JSON has no room for makes texts of all
        "worker": "a\\n",
        "big": str(2**70),
    }


def test_a_line_for_people_ends_with_the_request():
    log = Log("text")
    token = current_request.set("req-1")
    try:
        log.logger.info("within")
    finally:
        current_request.reset(token)
    log.logger.info("outside")
    log.logger.info("of another", extra={"request_id": "req-2"})
    assert [line.split(" ", 1)[1] for line in log.lines] == [
        "INFO    within id=req-1",
        "INFO    outside",
        "INFO    of another id=req-2",
    ]


def broken(kind: type[Exception]) -> Exception:
    """As raised by code of ours in the middle of a request."""
    prompt = CANARY
    try:
        try:
            {}[prompt]
        except KeyError as error:
            raise kind(f"what was sent: {prompt}") from error
    except kind as error:
        return error


@pytest.mark.parametrize("kind", ["text", "json"])
def test_an_exception_tells_its_way_and_not_what_it_quotes(kind):
    log = Log(kind)
    log.logger.error("a defect", exc_info=broken(ValueError))
    told = "\n".join(log.lines)
    assert CANARY not in told
    assert "KeyError" in told
    assert "ValueError" in told
    assert "test_log_format.py" in told
    assert all(line.startswith("    ") for line in log.lines[1:])


def test_what_the_system_or_our_code_says_is_told():
    with pytest.raises(FileNotFoundError) as missing:
        Path("/no/such/file").read_text()
    assert "FileNotFoundError: [Errno 2]" in exception_lines(missing.value)[-1]
    with pytest.raises(TypeError) as wrong:
        len(5)
    assert "has no len()" in exception_lines(wrong.value)[-1]


@pytest.mark.parametrize("kind", ["text", "json"])
async def test_what_asyncio_says_of_a_task_or_callback_quotes_nothing(kind):
    log = Log(kind, "asyncio")
    own = logging.getLogger("asyncio")
    handlers, own.handlers, own.propagate = own.handlers, log.logger.handlers, False
    try:
        loop = asyncio.get_running_loop()

        async def fails(prompt: str) -> None:
            raise ValueError(prompt)

        task = loop.create_task(fails(CANARY), name=CANARY)
        await asyncio.wait([task])
        del task  # never retrieved
        loop.call_soon(lambda prompt: {}[prompt], CANARY)
        async with asyncio.timeout(10):
            while len([line for line in log.lines if "xception" in line]) < 2:
                await asyncio.sleep(0)
    finally:
        own.handlers, own.propagate = handlers, True
    told = "\n".join(log.lines)
    assert CANARY not in told
    assert "Task exception was never retrieved" in told
    assert "Exception in callback" in told
    assert "KeyError" in told


def test_a_defect_that_ends_the_program_is_a_log_line(tmp_path):
    script = tmp_path / "defect.py"
    script.write_text(
        "import sys\n"
        "from balancer import logs\n"
        "logs.set_up('DEBUG', sys.argv[1])\n"
        "class Dies:\n"
        "    def __del__(self): raise ValueError('canary-7f3a')\n"
        "Dies()\n"
        "{}['canary-7f3a']\n"
    )
    for kind in ("text", "json"):
        done = subprocess.run(
            [sys.executable, str(script), kind],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": "."},
            timeout=60,
        )
        assert done.returncode == 1
        assert CANARY not in done.stderr + done.stdout
        assert "a defect ends the program" in done.stderr
        assert "a defect in a finalizer" in done.stderr
        if kind == "json":
            assert {json.loads(line)["level"] for line in done.stderr.splitlines()} == {"CRITICAL", "ERROR"}
