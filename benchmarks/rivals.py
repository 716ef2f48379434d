"""Other balancers and proxies, to be measured in the same rounds: how each is got, started and told of its
workers. Each is as its makers ship it, on one core, with what a room needs switched on and logs switched off.

What is got goes into a cache folder of this user: nothing of it becomes a dependency of the project.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from benchmarks.mock_worker import MODEL

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-balancer-benchmarks"
INSTALL_SECONDS = 900.0
HEARTBEAT_SECONDS = 5.0


class NotInstalled(Exception):
    """Why it cannot be had here, and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one start of a rival happens."""

    program: Path
    port: int
    """On loopback, to listen on."""
    spare_port: int
    """For whatever else it must listen on."""
    workers: Sequence[int]
    """Ports of the mock workers, on loopback."""
    folder: Path
    """Empty; for its files."""

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.workers]

    def write(self, name: str, text: str) -> str:
        """A file of its; gives the path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: Callable[[], Coroutine[None, None, None]] | None = None
    """What must go on as long as it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One way to run one program."""

    name: str
    package: str
    """On the Python package index, or a system's package of the same name."""
    program: str
    """Its file, in the virtual environment or the system."""
    launch: Callable[[Place], Launch]
    debs: tuple[str, ...] = ()
    """The Debian packages that hold it, libraries included; empty: it is a Python package."""
    ready_seconds: float = 60.0


# Each of them ................................................................................


def _nginx(place: Place) -> Launch:
    servers = "\n".join(f"    server 127.0.0.1:{port};" for port in place.workers)
    config = f"""
daemon off;
worker_processes 1;
{"user root;" if os.geteuid() == 0 else ""}
pid {place.folder}/pid;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {place.folder}/body;
  proxy_temp_path {place.folder}/proxy;
  fastcgi_temp_path {place.folder}/fastcgi;
  uwsgi_temp_path {place.folder}/uwsgi;
  scgi_temp_path {place.folder}/scgi;
  client_body_buffer_size 64k;
  keepalive_requests 1000000;
  upstream room {{
{servers}
    keepalive 1024;
    keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{place.port} backlog=1024;
    location / {{
      proxy_pass http://room;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
    path = place.write("nginx.conf", config)
    return Launch(
        argv=(str(place.program), "-e", "stderr", "-p", str(place.folder), "-c", path),
        environment=_libraries(place.program),
    )


def _haproxy(place: Place) -> Launch:
    servers = "\n".join(f"  server w{number} 127.0.0.1:{port}" for number, port in enumerate(place.workers))
    config = f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 300s
  timeout server 300s
frontend clients
  bind 127.0.0.1:{place.port}
  default_backend room
backend room
  balance roundrobin
{servers}
"""
    path = place.write("haproxy.cfg", config)
    return Launch(argv=(str(place.program), "-db", "-f", path), environment=_libraries(place.program))


def _libraries(program: Path) -> dict[str, str]:
    """Of a package that was only unpacked."""
    found = sorted((program.parents[1] / "lib").glob("*-linux-gnu"))
    return {"LD_LIBRARY_PATH": str(found[0])} if found and program.is_relative_to(CACHE) else {}


def _litellm(place: Place) -> Launch:
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in place.urls
    ]
    # JSON is YAML.
    path = place.write("config.yaml", orjson.dumps({"model_list": models}).decode())
    return Launch(
        argv=(
            *(str(place.program), "--config", path, "--host", "127.0.0.1", "--port", str(place.port)),
            *("--num_workers", "1", "--telemetry", "False"),
        ),
        environment={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            # It is on loopback, and the others ask for no key either.
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        },
    )


def _sglang(policy: str) -> Callable[[Place], Launch]:
    return lambda place: Launch(
        argv=(
            *(str(place.program), "launch", *_router_arguments(place, policy)),
            *("--max-concurrent-requests", "4096"),
        )
    )


def _vllm(policy: str) -> Callable[[Place], Launch]:
    return lambda place: Launch(argv=(str(place.program), *_router_arguments(place, policy)))


def _router_arguments(place: Place, policy: str) -> tuple[str, ...]:
    return (
        *("--host", "127.0.0.1", "--port", str(place.port), "--policy", policy),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(place.spare_port)),
        *("--worker-startup-check-interval", "1", "--log-level", "error", "--worker-urls", *place.urls),
    )


HERD_WITHOUT_ANNOUNCEMENT = """
import sys
import uvicorn
from fleet_manager.common.discovery import FleetServiceAdvertiser
from fleet_manager.models.config import ServerSettings
from fleet_manager.server.app import create_app

async def nothing(*_):
    pass

FleetServiceAdvertiser.start = FleetServiceAdvertiser.stop = nothing
settings = ServerSettings(host="127.0.0.1", port=int(sys.argv[1]))
uvicorn.run(create_app(settings), host=settings.host, port=settings.port, log_level="warning")
"""
"""As its own command starts it, but that it does not announce itself to the whole network: there is no
setting for that."""


def _herd(place: Place) -> Launch:
    python = place.program.parent / "python"
    return Launch(
        argv=(str(python), "-c", HERD_WITHOUT_ANNOUNCEMENT, str(place.port)),
        environment={
            "HOME": str(place.folder),
            "FLEET_DATA_DIR": str(place.folder / "data"),
            "FLEET_NODE_TELEMETRY": "false",
            "FLEET_FLEET_INTELLIGENCE": "false",
            "FLEET_AUTO_PULL": "false",
        },
        beside=lambda: _heartbeats(place),
    )


async def _heartbeats(place: Place) -> None:
    """What its agents would tell it of machines on which these workers run."""
    name = f"{MODEL}:latest"  # as Ollama calls a model without a tag
    loaded = {"name": name, "size_gb": 1.0, "context_length": 32768}
    async with aiohttp.ClientSession() as http:
        while True:
            for port in place.workers:
                beat = {
                    "node_id": f"node-{port}",
                    "cpu": {"cores_physical": 8, "utilization_pct": 5.0},
                    "memory": {"total_gb": 64.0, "used_gb": 8.0, "available_gb": 56.0},
                    "ollama": {"models_loaded": [loaded], "models_available": [name], "num_parallel": 256},
                    "ollama_host": f"http://127.0.0.1:{port}",
                    "lan_ip": "127.0.0.1",
                }
                with suppress(aiohttp.ClientError):
                    async with http.post(f"http://127.0.0.1:{place.port}/heartbeat", json=beat):
                        pass
            await asyncio.sleep(HEARTBEAT_SECONDS)


HAPROXY_DEBS = ("haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")

RIVALS: tuple[Rival, ...] = (
    Rival(name="nginx", package="nginx", program="nginx", launch=_nginx, debs=("nginx",)),
    Rival(name="HAProxy", package="haproxy", program="haproxy", launch=_haproxy, debs=HAPROXY_DEBS),
    Rival(
        name="vllm-router, round robin",
        package="vllm-router",
        program="vllm-router",
        launch=_vllm("round_robin"),
    ),
    Rival(name="vllm-router", package="vllm-router", program="vllm-router", launch=_vllm("cache_aware")),
    Rival(
        name="sglang-router, round robin",
        package="sglang-router",
        program="sglang-router",
        launch=_sglang("round_robin"),
    ),
    Rival(
        name="sglang-router",
        package="sglang-router",
        program="sglang-router",
        launch=_sglang("cache_aware"),
    ),
    Rival(
        name="LiteLLM",
        package="litellm[proxy]",
        program="litellm",
        launch=_litellm,
        ready_seconds=180.0,
    ),
    Rival(name="ollama-herd", package="ollama-herd", program="herd", launch=_herd),
)

# How they are got ............................................................................


def program_of(rival: Rival, cache: Path = CACHE) -> Path:
    """Its file. Raises `NotInstalled`."""
    if rival.debs:
        found = shutil.which(rival.program)
        candidates = [Path(found)] if found else []
        candidates.append(_folder(rival, cache) / "usr" / "sbin" / rival.program)
    else:
        candidates = [_folder(rival, cache) / "bin" / rival.program]
    for path in candidates:
        if path.exists():
            return path
    raise NotInstalled(f"{rival.package} is not installed: run with --install")


def install(rival: Rival, cache: Path = CACHE) -> None:
    """Gets it into the cache folder, unless it is there or the system has it. Raises `NotInstalled`."""
    with suppress(NotInstalled):
        program_of(rival, cache)
        return
    folder = _folder(rival, cache)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for arguments in _unpacking(rival, folder) if rival.debs else _installing(rival, folder):
            _run(arguments, folder)
        program_of(rival, cache)
    except (NotInstalled, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise NotInstalled(f"{rival.package} cannot be installed here: {error}") from None


def version(rival: Rival, cache: Path = CACHE) -> str:
    """As it says itself; empty: it does not."""
    program = program_of(rival, cache)
    if rival.debs:
        arguments = [str(program), "-v"]
    else:
        name = rival.package.partition("[")[0]
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        arguments = [str(program.parent / "python"), "-c", code]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | _libraries(program), check=False
    )
    words = (done.stdout or done.stderr).partition("\n")[0].replace("/", " ").split()
    return next((word for word in words if word[:1].isdigit()), "")


def _folder(rival: Rival, cache: Path) -> Path:
    return cache / rival.package.partition("[")[0]


def _installing(rival: Rival, folder: Path) -> list[list[str]]:
    python = str(folder / "bin" / "python")
    if shutil.which("uv"):
        return [
            ["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
            ["uv", "pip", "install", "--quiet", "--python", python, rival.package],
        ]
    return [
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", rival.package],
    ]


def _unpacking(rival: Rival, folder: Path) -> list[list[str]]:
    """Unpacked and not installed: no service is started, and no right to install is needed."""
    if not shutil.which("apt-get"):
        raise NotInstalled(f"install {rival.package} with this system's package manager")
    unpack = f"for deb in {folder}/*.deb; do dpkg -x $deb {folder} || exit 1; done"
    return [["apt-get", "download", *rival.debs], ["sh", "-c", unpack]]


def _run(arguments: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{arguments[0]} took longer than {INSTALL_SECONDS:.0f} s") from None
    if done.returncode:
        raise NotInstalled(f"{arguments[0]} said: {done.stderr.strip()[-300:]}")


@asynccontextmanager
async def beside(launch: Launch) -> AsyncIterator[None]:
    """What must go on as long as it runs goes on while the block lasts."""
    task = None if launch.beside is None else asyncio.ensure_future(launch.beside())
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
