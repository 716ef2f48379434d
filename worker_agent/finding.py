"""Finds the balancers of an agent's own cluster by mDNS, so that a new machine needs no address.

A hint and no more: a balancer that is joined comes to meet the agent, and proves that it holds the key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from worker_agent import wire
from worker_agent.reachability import by_reachability, own_interfaces

_LOG = logging.getLogger(__name__)
_MOST_NAMES = 32  # anybody may announce anything; those of one room are few
_RESOLVE_SECONDS = 3.0
_LOOK_AGAIN_SECONDS = 30.0


def balancer_url(announced: wire.Announced, address: str, port: int) -> str:
    """Where that balancer answers. One that tells of a certificate speaks TLS. Pure."""
    host = f"[{address}]" if ":" in address else address
    return f"{'https' if announced.fingerprint else 'http'}://{host}:{port}"


def is_ours(announced: wire.Announced, own_tag: str) -> bool:
    """Whether a balancer that says this may be of our cluster: while we hold no key, any may. Pure."""
    return not own_tag or announced.tag == own_tag


async def found_balancers(
    tag: Callable[[], str],
    found: Callable[[str], None],
    interfaces: Sequence[str] | None = None,
    forget: Callable[[], None] = lambda: None,
) -> None:
    """Gives the URL of each balancer of our cluster, again and again while it is announced, until cancelled.

    `tag`: `handshake.cluster_tag` of the key that we hold now; empty: none yet. `interfaces`: the addresses
    of those to listen on; None: all. `forget` is called when the tag has changed: what was found before is
    found anew, if it is ours.
    """
    told_of_failure = False
    while True:
        try:
            zeroconf = _opened(interfaces)
            try:
                await zeroconf.zeroconf.async_wait_for_start()
                told_of_failure = False
                await _browse(zeroconf, tag, found, forget)
            finally:
                await zeroconf.async_close()
        except (OSError, ZeroconfError, RuntimeError, TimeoutError) as error:
            # RuntimeError is what zeroconf raises where no interface is up.
            if not told_of_failure:
                told_of_failure = True
                _LOG.info("cannot look for balancers by mDNS (%s)", str(error) or type(error).__name__)
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)


def _opened(interfaces: Sequence[str] | None) -> AsyncZeroconf:
    if interfaces is not None:
        return AsyncZeroconf(interfaces=list(interfaces))
    try:
        return AsyncZeroconf(ip_version=IPVersion.All)
    except OSError:  # a machine without IPv6
        return AsyncZeroconf(ip_version=IPVersion.V4Only)


async def _browse(
    zeroconf: AsyncZeroconf,
    tag: Callable[[], str],
    found: Callable[[str], None],
    forget: Callable[[], None],
) -> None:
    names: set[str] = set()
    ours = tag()
    news = asyncio.Event()

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            names.discard(name)
        elif len(names) < _MOST_NAMES:
            names.add(name)
            news.set()

    browser = AsyncServiceBrowser(zeroconf.zeroconf, wire.BALANCER_SERVICE_TYPE, handlers=[changed])
    try:
        while True:
            news.clear()
            if ours != tag():
                ours = tag()
                forget()
            urls = await asyncio.gather(*(_resolved(zeroconf.zeroconf, name, ours) for name in sorted(names)))
            for url in urls:
                if url is not None:
                    found(url)
            try:
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    await news.wait()
            except TimeoutError:
                pass  # what was announced may have changed without our hearing of it
    finally:
        await browser.async_cancel()


async def _resolved(zeroconf: Zeroconf, name: str, own_tag: str) -> str | None:
    """Where the balancer of this announcement is; None: nowhere that we know of, or it is not ours."""
    info = AsyncServiceInfo(wire.BALANCER_SERVICE_TYPE, name)
    try:
        if not await info.async_request(zeroconf, _RESOLVE_SECONDS * 1000) or info.port is None:
            return None
        announced = wire.parse_txt(info.properties)
    except wire.WireError as error:
        _LOG.debug("the balancer announced as %r is ignored: %s", name[:128], error)
        return None
    except Exception as error:
        # Hostile packets must not end the search; zeroconf does not say what it may raise, and quotes them.
        _LOG.debug("the mDNS announcement %r could not be read: %s", name[:128], type(error).__name__)
        return None
    addresses = by_reachability(info.parsed_scoped_addresses(), own_interfaces())
    if not addresses or not is_ours(announced, own_tag):
        return None
    return balancer_url(announced, addresses[0], info.port)
