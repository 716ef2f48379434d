"""`balancer keys ...` and `balancer audit`: they ask a running balancer, and print."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import quote

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balancer.admin_cli import DEFAULT_URL, DataOption, JsonOption, KeyOption, UrlOption, asked, fail, key_for

keys = typer.Typer(help="API keys of clients, for the setting auth: keys.", no_args_is_help=True)

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,6})([mhdw])")

_Name = Annotated[str, typer.Option("--name", help="Whose it is; for people and for the log.")]
_Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="MODEL", help="The only one it is for; may be given several times."),
]
_Class = Annotated[
    Literal["interactive", "batch", "both"] | None,
    typer.Option("--class", metavar="CLASS", help="interactive, batch or both; default: both."),
]
_Expires = Annotated[
    str | None, typer.Option("--expires", metavar="TIME", help="After so long: 90m, 12h, 30d or 4w.")
]
_Rate = Annotated[int | None, typer.Option("--rpm", min=1, help="Requests per minute at most.")]
_Concurrent = Annotated[
    int | None, typer.Option("--concurrent", min=1, help="Requests under way at once at most.")
]
_LocalOnly = Annotated[
    bool | None,
    typer.Option("--local-only/--fallbacks", help="Whether its requests must not leave the room."),
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="As `balancer keys list` shows it.")]


@keys.command()
def create(
    name: _Name,
    model: _Models = None,
    service_class: _Class = None,
    expires: _Expires = None,
    rpm: _Rate = None,
    concurrent: _Concurrent = None,
    local_only: _LocalOnly = None,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key. It is shown once, now, and kept nowhere."""
    body = _fields(name, model, service_class, expires, rpm, concurrent, local_only)
    told = asked(url, "POST", "/admin/keys", body, key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    Console(stderr=True).print(Text(f"The key of {told['name']!r}, which is not shown again:"))
    print(told["key"])  # noqa: T201


@keys.command("list")
def list_keys(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show all keys, without what makes them keys."""
    told = asked(url, "GET", "/admin/keys", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    table = Table()
    table.add_column("id", no_wrap=True)  # to be copied whole
    for heading in ("name", "state", "models", "class", "per minute", "at once", "expires"):
        table.add_column(heading)
    for one in told["keys"]:
        most = one["max_concurrent"]
        table.add_row(
            *(Text(one["id"]), Text(one["name"]), one["state"], Text(", ".join(one["models"]) or "all")),
            one["class"] + (", local only" if one["local_only"] else ""),
            str(one["requests_per_minute"] or ""),
            f"{one['under_way']}" + (f"/{most}" if most else ""),
            (one["expires"] or "")[:16],
        )
    Console().print(table)


@keys.command("change")
def change_key(
    key_id: _Id,
    name: Annotated[str | None, typer.Option("--name", help="Another name.")] = None,
    model: _Models = None,
    service_class: _Class = None,
    expires: _Expires = None,
    rpm: _Rate = None,
    concurrent: _Concurrent = None,
    local_only: _LocalOnly = None,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Give a key other limits; what is left out stays as it is."""
    body = _fields(name, model, service_class, expires, rpm, concurrent, local_only)
    if not body:
        fail("say what is to change: see `balancer keys change --help`")
    told = asked(url, "PATCH", _path(key_id), body, key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
    else:
        _say(f"The key of {told['name']!r} has other limits from now on.")


@keys.command()
def revoke(
    key_id: _Id,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Refuse a key from now on, for good."""
    told = asked(url, "DELETE", _path(key_id), key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
    else:
        _say(f"The key of {told['name']!r} is revoked. {told['note']}")


def audit(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Records at most, the newest.")] = 50,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show who has changed what, oldest first."""
    told = asked(url, "GET", f"/admin/audit?limit={limit}", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    table = Table("time", "who", "from", "what", "result")
    for one in reversed(told["records"]):
        about = ", ".join(f"{value}" for value in one.get("targets", {}).values())
        done = one.get("what") or f"{one.get('method', '')} {one.get('route', '')} {about}".rstrip()
        times = f" ({one['times']} times)" if one.get("times") else ""
        result = f"{one.get('status', '')} {one.get('refused', '')}".rstrip() + times
        table.add_row(
            str(one["at"])[:19],
            *(Text(str(one.get(name, ""))) for name in ("who", "from")),
            Text(done),
            result,
        )
    Console().print(table)


def _fields(
    name: str | None,
    models: list[str] | None,
    service_class: str | None,
    expires: str | None,
    rpm: int | None,
    concurrent: int | None,
    local_only: bool | None,
) -> dict[str, object]:
    fields = {
        "name": name,
        "models": models or None,
        "class": service_class,
        "expires": None if expires is None else _time_after(expires),
        "requests_per_minute": rpm,
        "max_concurrent": concurrent,
        "local_only": local_only,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _time_after(text: str) -> str:
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        fail(f"--expires is {text!r}: expected 90m, 12h, 30d or 4w")
    try:
        return (datetime.now(UTC) + timedelta(seconds=int(found[1]) * _UNITS[found[2]])).isoformat()
    except OverflowError:
        fail(f"--expires is {text!r}: no calendar goes that far; leave it out for a key that does not expire")


def _path(key_id: str) -> str:
    return f"/admin/keys/{quote(key_id, safe='')}"


def _say(text: str) -> None:
    Console().print(Text(text), soft_wrap=True)


def _print_json(told: Mapping[str, Any]) -> None:
    print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
