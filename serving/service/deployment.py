"""What stands between a gateway's configuration and its users, on the machine that it is to run on.

A configuration can be valid and its gateway still be open to everybody, short of files, or without engines.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
from cryptography import x509

from laguna_serve.serving.gateway.config import Config, ConfigError, load_config
from laguna_serve.serving.gateway.config.tables import Upstream
from laguna_serve.serving.gateway.relay.open_files import count_slots, find_reserve
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.tables import Table
from laguna_serve.serving.machine.local_http import LOOPBACK
from laguna_serve.serving.machine.open_files import find_hard_limit

EXPIRES_SOON_S = 14 * 86400
# Of the folder that processes of an engine share tensors in; containers begin with 64 MiB.
SHARED = Path("/dev/shm")
SHARED_BYTES = 1 << 30


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is missing, and what to do about it. `serious`: users would be refused, or strangers served."""

    what: str
    remedy: str
    serious: bool = False


class DeploymentResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.deployment/1"):
    """The check of a deployment. `ok`: nothing serious is missing."""

    configuration: str
    ok: bool
    gaps: tuple[Gap, ...]


class DeploymentError(CommandError, ValueError):
    """A configuration that cannot be read, as one line."""


def check_deployment(path: Path) -> DeploymentResult:
    """Look at what a gateway with this configuration is missing. Raises DeploymentError."""
    try:
        config = load_config(path)
    except ConfigError as error:
        raise DeploymentError(str(error)) from None
    return inspect_deployment(config, str(path))


def inspect_deployment(config: Config, source: str) -> DeploymentResult:
    """Look at the configuration, this machine, and the engines that it names."""
    gaps = (*_find_open_doors(config), *_find_shortages(config), *_find_manners(config), *_find_engines(config))
    return DeploymentResult(configuration=source, ok=not any(gap.serious for gap in gaps), gaps=gaps)


def _find_open_doors(config: Config) -> Iterator[Gap]:
    """Look for what lets strangers in, or lets others read along."""
    server = config.server
    if server.host in LOOPBACK:
        return
    if not config.all_keys:
        yield Gap(
            what=f"keys: {server.host} is not loopback, and everybody who reaches it may ask",
            remedy="laguna keys new NAME --file FILE, or keep it behind something that asks who it is",
            serious=True,
        )
    if server.ssl_certfile is None and not server.trusted_proxies:
        yield Gap(
            what="TLS: neither a certificate nor a proxy that has one (server.trusted_proxies)",
            remedy="set server.ssl_certfile and ssl_keyfile, or name the proxy's network",
        )
    if server.ssl_certfile is not None:
        left_s = read_expiry(Path(server.ssl_certfile)) - time.time()
        if left_s < EXPIRES_SOON_S:
            yield Gap(
                what=f"certificate: {server.ssl_certfile} ends in {left_s / 86400:.0f} days",
                remedy="renew it at the same path and send SIGHUP",
                serious=left_s <= 0,
            )


def read_expiry(path: Path) -> float:
    """Read until when the first certificate of a PEM file holds, in seconds since 1970."""
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()


def _find_shortages(config: Config) -> Iterator[Gap]:
    """Look for what this machine has too little of."""
    needed, limit = 2 * count_slots(config) + find_reserve(config), find_hard_limit()
    if limit < needed:
        yield Gap(
            what=f"open files: {limit} at most, and {count_slots(config)} requests at once take {needed}",
            remedy="raise the hard limit (LimitNOFILE=, ulimit -Hn)",
            serious=True,
        )
    owned = any(model.engine is not None for model in config.models)
    if owned and SHARED.is_dir() and (free := shutil.disk_usage(SHARED).free) < SHARED_BYTES:
        yield Gap(
            what=f"shared memory: {free >> 20} MiB free in {SHARED}, which engines share tensors in",
            remedy="docker run --shm-size 8g or --ipc host; an emptyDir of medium Memory in Kubernetes",
        )
    if config.access.usage_file is not None and (why := _refuses(Path(config.access.usage_file).absolute().parent)):
        yield Gap(
            what=f"usage: access.usage_file cannot be written ({why})",
            remedy="give the gateway's user its folder, or budgets begin anew at every start",
            serious=True,
        )


def _refuses(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _find_manners(config: Config) -> Iterator[Gap]:
    """Look for what balancers and operators would miss."""
    if config.server.trusted_proxies and not config.server.lame_duck_s:
        yield Gap(
            what="balancer: requests that it sends in the seconds after SIGTERM are refused",
            remedy="set server.lame_duck_s to more than its interval of health checks",
        )
    if any(key.tokens_per_day for key in config.all_keys) and config.access.usage_file is None:
        yield Gap(
            what="budgets: a restart forgets what was used of tokens_per_day",
            remedy="set access.usage_file",
        )


def _find_engines(config: Config) -> Iterator[Gap]:
    """Ask every engine that has a URL whether it is well."""
    asked = [(model.name, one) for model in config.models if model.engine is None for one in model.upstreams]
    if asked:
        answers = asyncio.run(_ask_all([one for _, one in asked], config))
        for (model, one), trouble in zip(asked, answers, strict=True):
            if trouble is not None:
                yield Gap(
                    what=f"engine: {one.name} of {model} at {one.url} is not well ({trouble})",
                    remedy="start it, or correct its url, api_key_file or tls_ca_file",
                    serious=True,
                )


async def _ask_all(upstreams: list[Upstream], config: Config) -> list[str | None]:
    timeout = aiohttp.ClientTimeout(total=config.health.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return await asyncio.gather(*(_ask(session, one, config.health.path) for one in upstreams))


async def _ask(session: aiohttp.ClientSession, upstream: Upstream, path: str) -> str | None:
    """Say what is wrong with an engine; None where nothing is."""
    url = f"{upstream.url}{upstream.health_path or path}"
    try:
        async with session.get(url, **upstream.request_options()) as answer:
            return None if answer.status == 200 else f"status {answer.status} for {url}"
    except TimeoutError:
        return f"no answer from {url} in time"
    except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
        return str(error) or type(error).__name__


def format_deployment(result: DeploymentResult) -> str:
    """Format what is missing, the serious first."""
    if not result.gaps:
        return f"{result.configuration}: nothing is missing that can be seen from here"
    gaps = sorted(result.gaps, key=lambda gap: not gap.serious)
    rows = [("missing" if gap.serious else "advised", gap.what, gap.remedy) for gap in gaps]
    return Table("lll", ("", "what", "what to do"), rows).to_text()
