"""`balancer config ...`: what holds, where it comes from, and whether a running balancer has it."""

import json
from pathlib import Path

import pytest

from balancer import keys
from tests.e2e.conftest import OpenRoom, listed
from tests.e2e.processes import command
from tests.fakes.engine import FakeEngine

SCHEMA = Path(__file__).parents[2] / "configs" / "balancer.schema.json"


async def config(tmp_path: Path, *words: str, **variables: str) -> tuple[int, str]:
    async with command(
        "balancer", "config", *words, output=tmp_path / "out.txt", home=tmp_path, COLUMNS="200", **variables
    ) as running:
        return await running.ended(), running.text()


async def test_the_schema_is_the_published_one(tmp_path: Path):
    assert await config(tmp_path, "schema") == (0, SCHEMA.read_text())


async def test_each_setting_is_shown_with_where_it_comes_from_and_no_secret(tmp_path: Path):
    file = tmp_path / "balancer.json"
    (tmp_path / "key").write_text("canary-worker-key")
    file.write_text(
        '{\n  "max_queue": 7,\n  "max_wait": 8,\n'
        '  "workers": [{"id": "a", "host": "10.0.0.1", "api_key": {"file": "key"}}]\n}'
    )
    words = ("show", "--config", str(file), "--port", "4001")
    secret = {"BALANCER_ADMIN_KEY": "canary-admin-key-of-some-length", "BALANCER_MAX_WAIT": "9"}
    status, said = await config(tmp_path, *words, "--json", **secret)
    told = json.loads(said)
    assert status == 0
    settings = told["settings"]
    assert settings["max_queue"] == {"value": 7, "source": "balancer.json:2:3"}
    assert settings["max_wait"] == {"value": 9.0, "source": "BALANCER_MAX_WAIT"}
    assert settings["port"] == {"value": 4001, "source": "--port"}
    assert settings["max_retries"] == {"value": 3, "source": "default"}
    assert settings["admin_key"] == {"value": "******", "source": "BALANCER_ADMIN_KEY"}
    (worker,) = told["workers"]
    assert (worker["url"], worker["api_key"], worker["source"]) == (
        "http://10.0.0.1:8000",
        "******",
        "balancer.json:4:15",
    )
    status, table = await config(tmp_path, *words, **secret)
    assert (status, "balancer.json:4:15" in table, "BALANCER_MAX_WAIT" in table) == (0, True, True)
    assert "canary" not in said + table


@pytest.mark.parametrize("words", [("check",), ("show", "--config")])
async def test_a_broken_file_is_said_by_line_and_column(tmp_path: Path, words: tuple[str, ...]):
    file = tmp_path / "balancer.json"
    file.write_text('{\n "prot": 1}')
    status, said = await config(tmp_path, *words, str(file))
    assert (status, f'{file}:2:2: unknown key "prot", did you mean "port"?' in said) == (2, True)


@pytest.mark.parametrize(
    ("more", "variables", "status"),
    [
        ("", {}, 2),
        (', "tls_cert_file": "c.pem"', {}, 2),
        (', "tls_cert_file": "c.pem", "tls_key_file": "k.pem"', {}, 0),
        (', "tls_cert_file": "c.pem"', {"BALANCER_TLS_KEY_FILE": "k.pem"}, 0),
    ],
)
async def test_a_certificate_that_is_named_nowhere_is_said_before_the_start(
    tmp_path: Path, more: str, variables: dict[str, str], status: int
):
    file = tmp_path / "balancer.json"
    file.write_text('{\n "tls": "files"' + more + "}")
    done, said = await config(tmp_path, "check", str(file), **variables)
    fault = f'{file}:2:2: "tls": "files" needs both "tls_cert_file" and "tls_key_file"'
    assert (done, fault in said) == (status, status == 2), said


async def test_what_is_wrong_with_the_file_of_a_running_balancer_is_shown_on_a_line_of_its_own(
    open_room: OpenRoom, tmp_path: Path
):
    async with open_room() as room:
        room.config.write_text('{\n "prot": 1}')
        await room.admin("POST", "/config/reload")
        variables = {"BALANCER_ADMIN_KEY": keys.read(room.data_dir / "admin_key"), "COLUMNS": "60"}
        async with command(
            *("balancer", "config", "show", "--url", room.url),
            output=tmp_path / "out.txt",
            home=tmp_path,
            **variables,
        ) as running:
            assert await running.ended() == 0
            lines = running.text().splitlines()
        at = next(number for number, line in enumerate(lines) if "broken since" in line)
        assert lines[at + 1] == f'{room.config}:2:2: unknown key "prot", did you mean "port"?'


async def test_what_the_running_balancer_has_and_the_file_has_not_is_shown(
    open_room: OpenRoom, tmp_path: Path
):
    async with FakeEngine() as engine, open_room(engine, max_body_mib=7) as room:
        room.config.write_text(json.dumps({"workers": [listed(engine, "a")], "max_body_mib": 8}))
        words = ("show", "--config", str(room.config), "--url", room.url)
        key = {"BALANCER_ADMIN_KEY": keys.read(room.data_dir / "admin_key")}
        status, said = await config(tmp_path, *words, "--json", **key)
        told = json.loads(said)
        assert (status, told["settings"]["max_body_mib"]["value"]) == (0, 8)
        assert told["settings"]["max_body_mib"]["running"] == 7
        assert "running" not in told["settings"]["max_queue"]
        assert told["running"]["status"]["state"] == "ok"
        await room.admin("POST", "/config/reload")
        room.config.write_text("{")
        await room.admin("POST", "/config/reload")
        room.config.write_text("{}")
        status, said = await config(tmp_path, *words, **key)
        assert (status, "broken since" in said, "ends here too early" in said) == (0, True, True)
        assert "These hold from its next start on: health_check_interval, max_body_mib" in said
