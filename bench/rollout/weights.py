"""Later versions of a policy for engines that are running, by vLLM's own routes; the drafter stays as it is.

The steps are those of vllm/entrypoints/rl/online/api_router.py (0.32): pause, start, the folder, finish, empty the
prefix cache, resume. An engine takes them when it was started with `EngineConfig(weight_updates=True)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import aiohttp
import msgspec

from laguna_serve.bench.arms.arms import Arm
from laguna_serve.serving.checkpoint import CheckpointError, find_folder
from laguna_serve.serving.checkpoint.stored.weight_files import read_headers
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.kit.files import expand

TIMEOUT_S = 600.0
NOT_FOUND = 404
# These routes are for developers; `laguna serve --weight-updates` switches them on, too.
NO_ROUTE = "start that server with VLLM_SERVER_DEV_MODE=1"


class _Answer(msgspec.Struct, frozen=True):
    """What is read of these routes' answers."""

    success: bool | None = None
    weight_version: str | None = None


def open_versions(model: str | None, folders: Sequence[str]) -> dict[str, Path]:
    """Name → folder of every version, in the order given; a version is called like its folder.

    `model` is None for an endpoint's, whose checkpoint is not known.

    Raises:
        CheckpointError: a folder is not there, two have one name, or the tensors are not those of the model.
    """
    versions: dict[str, Path] = {}
    for given in folders:
        path = expand(given).resolve()
        if not path.is_dir():
            raise CheckpointError(f"--versions {given}: expected a checkpoint folder, got none; check the path")
        if path.name in versions:
            raise CheckpointError(f"--versions {given}: expected folders of different names, got two; rename one")
        versions[path.name] = path
    own = find_folder(model) if versions and model is not None else None
    expected = {name: header.shape for name, header in read_headers(own).items()} if own is not None else {}
    for path in versions.values():
        _check_tensors(path, {name: header.shape for name, header in read_headers(path).items()}, expected)
    return versions


def _check_tensors(path: Path, tensors: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    if not tensors:
        raise CheckpointError(f"{path}: expected *.safetensors in it, got none; write the version first")
    for name in sorted(expected.keys() | tensors.keys()) if expected else ():
        if expected.get(name) != tensors.get(name):
            shape, got = (str(list(s[name])) if name in s else "none" for s in (expected, tensors))
            remedy = "a version has the model's own architecture"
            raise CheckpointError(f"{path}: expected tensor {name} {shape}, got {got}; {remedy}")


async def give_version(session: aiohttp.ClientSession, arm: Arm, name: str, folder: Path) -> None:
    """Switch the arm's engine to a version of the weights, and check that it says so.

    Raises:
        EngineError, EndpointError: the engine died, or refused a step.
    """
    await _ask(session, arm, "/pause", params={"mode": "wait"})
    await _ask(session, arm, "/start_weight_update")
    await _ask(session, arm, "/update_weights", {"update_info": {"folder": str(folder)}})
    await _ask(session, arm, "/finish_weight_update", {"weight_version": name})
    await empty_cache(session, arm)
    await _ask(session, arm, "/resume")
    served = (await _ask(session, arm, "/weight_info", method="GET")).weight_version
    if served != name:
        raise EndpointError(f"{arm.name}: expected version {name} after the update, got {served!r}; restart the engine")


async def check_start(session: aiohttp.ClientSession, arm: Arm, versions: Collection[str]) -> None:
    """Check, where there are versions, that none is served yet: an earlier run leaves a server with its last one.

    Raises:
        EngineError, EndpointError: the engine died, does not say, or serves one.
    """
    served = (await _ask(session, arm, "/weight_info", method="GET")).weight_version if versions else None
    if served in versions:
        raise EndpointError(f"{arm.name}: expected the model itself, got {served} of --versions; restart that server")


async def empty_cache(session: aiohttp.ClientSession, arm: Arm) -> None:
    """Forget the keys and values of every earlier prompt.

    Raises:
        EngineError, EndpointError: the engine died, or did not do it.
    """
    answer = await _ask(session, arm, "/reset_prefix_cache", params={"reset_running_requests": "true"})
    if answer.success is not True:
        raise EndpointError(
            f"{arm.name}: /reset_prefix_cache: expected success, got {answer.success}; is something running?"
        )


async def _ask(
    session: aiohttp.ClientSession,
    arm: Arm,
    path: str,
    body: Mapping[str, object] | None = None,
    params: Mapping[str, str] | None = None,
    method: str = "POST",
) -> _Answer:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    url = arm.base_url + path
    try:
        async with session.request(method, url, json=body, params=params, timeout=timeout) as response:
            if response.status != 200:
                reason = f"HTTP {response.status}: {(await response.text(errors='replace'))[:300]}"
                remedy = f"; {NO_ROUTE}" if response.status == NOT_FOUND else ""
                raise EndpointError(f"{arm.name}: {path}: expected HTTP 200, got {reason}{remedy}")
            return msgspec.json.decode(await response.read(), type=_Answer)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
        arm.check()
        raise EndpointError(f"{arm.name}: {path}: expected an answer, got {type(error).__name__}: {error}") from error
