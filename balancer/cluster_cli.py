"""`balancer cluster ...` and `balancer workers approve`: commands that ask a running balancer about who
belongs to it. They parse, call and print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balancer.admin_cli import DEFAULT_URL, DataOption, JsonOption, KeyOption, UrlOption, asked, key_for

cluster = typer.Typer(
    help="Who belongs to this balancer: invite machines, see who waits, change the key.", no_args_is_help=True
)

AgentArgument = Annotated[str, typer.Argument(metavar="ID", help="As `balancer cluster show` lists it.")]


@cluster.command()
def invite(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show the command that makes another machine a worker of this balancer. It holds the cluster key.

    For a program, --json has the invitation alone: it is what `worker-agent join -` reads.
    """
    told = asked(url, "POST", "/admin/cluster/invite", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    print(told["command"])  # noqa: T201  # alone on its line, to be copied
    hint = Console(stderr=True)
    hint.print(Text(told["note"], style="dim"))
    if all(one.startswith(("127.", "[::1]", "localhost")) for one in told["balancers"]):
        hint.print(
            Text("This balancer listens on its own machine only: start it with --host 0.0.0.0", "yellow")
        )


@cluster.command()
def show(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show which agents are known, wait to be let in, or are turned away."""
    told = asked(url, "GET", "/admin/cluster", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    console = Console()
    console.print(Text(f"{told['id']}, cluster {told['tag']}"))
    table = Table("agent", "is", "certificate (SHA-256)")
    for agent in told["agents"]:
        table.add_row(
            Text(agent["id"]), "met" if agent["met"] else "away", Text(agent["fingerprint"], overflow="fold")
        )
    console.print(table)
    print_waiting(console, told)
    print_turned_away(console, [*told["mismatches"], *told["turned_away"]])


@cluster.command()
def rotate_key(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Give the cluster a new key: every agent gets it, and earlier invitations hold no longer."""
    told = asked(url, "POST", "/admin/cluster/rotate-key", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    console = Console()
    table = Table("agent", "outcome")
    for agent in told["agents"]:
        table.add_row(Text(agent["id"]), Text(agent["outcome"]))
    console.print(table)
    console.print("Other balancers that shared the key need it too: copy cluster_key, and restart them.")


@cluster.command()
def forget(
    agent: AgentArgument,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Forget an agent's certificate, because its machine was set up anew or given to somebody else."""
    path = f"/admin/cluster/agents/{quote(agent, safe='')}"
    told = asked(url, "DELETE", path, key=key_for(url, admin_key_file, data_dir))
    _print_json(told) if json else print(f"{agent} is forgotten. {told['note']}")  # noqa: T201


def approve(
    agent: Annotated[str, typer.Argument(metavar="ID", help="As `balancer workers` lists it.")],
    code: Annotated[str, typer.Argument(metavar="CODE", help="That the agent shows, on its machine.")],
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Let a machine in that waits, by the code that it shows."""
    path = f"/admin/workers/{quote(agent, safe='')}/approve"
    key = key_for(url, admin_key_file, data_dir)
    told = asked(url, "POST", path, {"code": code}, key=key)
    _print_json(told) if json else print(f"{agent} is let in")  # noqa: T201


def print_waiting(console: Console, told: Mapping[str, Any]) -> None:
    """Who waits to be let in, with what to type."""
    for one in told["pending"]:
        console.print(Text(f"waiting to be let in: {one['id']} at {one['url']}", style="yellow"))
        console.print(Text(f"  {one['command']}"), Text("(the code that it shows)", style="dim"))


def print_turned_away(console: Console, strangers: Sequence[Mapping[str, Any]]) -> None:
    for one in strangers:
        console.print(Text(f"not let in: {one['id']} at {one['url']}: {one['reason']}", style="yellow"))


def _print_json(told: Mapping[str, Any]) -> None:
    print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
