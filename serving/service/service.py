"""`laguna serve` at work: an engine that is kept running, the gateway in front of it, until somebody ends both."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal

import msgspec

from laguna_serve.serving.engine import Engine, EngineError
from laguna_serve.serving.engine.keeper import Death, Keeper, RestartPolicy
from laguna_serve.serving.kit.progress import say
from laguna_serve.serving.kit.signals import interrupt_on_signals
from laguna_serve.serving.planning.engine_config import EngineConfig
from laguna_serve.serving.service.front import Front, FrontSettings, open_front
from laguna_serve.serving.speculation.acceptance import AcceptanceReport, AcceptanceWatch

STOPPED: Literal["stopped"] = "stopped"
DIED: Literal["died"] = "died"
WATCH_S = 0.5


class ServeResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.serve/1"):
    """How serving went.

    Attributes:
        outcome: "stopped" by a signal, or "died" and not started again.
        log: vLLM's.
        acceptance: of the last engine; None without speculation.
        restarts: how often an engine that had died was started again.
    """

    outcome: Literal["stopped", "died"]
    log: str
    url: str
    model: str
    acceptance: AcceptanceReport | None
    restarts: int
    deaths: tuple[Death, ...]
    uptime_s: float


def serve(
    config: EngineConfig,
    settings: FrontSettings | None,
    api_key: str | None,
    log_path: Path,
    *,
    restart: bool,
    greet: Callable[[Engine, str, str | None], str],
) -> ServeResult:
    """Serve until a signal, or until the engine is given up.

    Args:
        settings: of the gateway in front of the engine; None: there is none.
        api_key: what the engine itself asks of requests.
        greet: the lines for stdout once it answers, from the engine, the URL and the status page's.
    Raises:
        EngineError: the engine or the gateway could not be started, or was interrupted before it answered.
    """
    interrupt_on_signals(hangup=True)
    early: list[int] = []
    if settings is not None and settings.file is not None:  # which the gateway reads when the engine is there
        signal.signal(signal.SIGHUP, lambda number, _frame: early.append(number))
    started = time.monotonic()
    url, acceptance = "", _LastAcceptance()

    def make() -> Engine:
        return Engine(config, log_path=log_path, announce=say, api_key=api_key)

    keeper = Keeper(make, RestartPolicy(), say)
    try:
        with keeper, nullcontext() if settings is None else open_front(settings, keeper.engine.base_url) as front:
            if front is not None and front.reloads:
                signal.signal(signal.SIGHUP, lambda _number, _frame: front.reload())
                if early:  # perhaps after the file had been read
                    front.reload()
            url = keeper.engine.base_url if front is None else front.url
            print(greet(keeper.engine, url, None if front is None else front.status), flush=True)
            died = _keep_serving(keeper, front, acceptance, restart=restart)
    except KeyboardInterrupt:
        if not url:
            raise EngineError(f"engine {config.model_name}: interrupted before it was ready; see {log_path}") from None
        died = False  # a second signal, while the first was obeyed
    return ServeResult(
        outcome=DIED if died else STOPPED,
        log=str(log_path),
        url=url,
        model=config.model_name,
        acceptance=acceptance.report,
        restarts=keeper.restarts,
        deaths=tuple(keeper.deaths),
        uptime_s=round(time.monotonic() - started, 1),
    )


class _LastAcceptance:
    """What the last engine's drafts came to."""

    report: AcceptanceReport | None = None

    def note(self, watch: AcceptanceWatch) -> None:
        """Keep what was known where the watch knows nothing."""
        self.report = watch.describe() or self.report


def _keep_serving(keeper: Keeper, front: Front | None, acceptance: _LastAcceptance, *, restart: bool) -> bool:
    """Keep serving until a signal (False), or until the engine has died for good (True)."""
    watch = _watch(keeper.engine)
    try:
        while True:
            _wait_for_death(keeper.engine, watch)
            if front is not None:  # at once: to say why it died takes a moment
                front.leave("it has died")
            acceptance.report = watch.describe()
            error = EngineError(keeper.engine.describe_death())
            keeper.note_death(error)
            if front is not None:
                front.note_deaths(keeper.deaths)
            if not restart:
                raise error
            keeper.revive()
            if front is not None:
                front.note_deaths(keeper.deaths)
                front.succeed(keeper.engine.base_url)
            watch = _watch(keeper.engine)
            say(f"engine {keeper.engine.model_name}: serving again, restart {keeper.restarts}")
    except EngineError as error:
        say(f"laguna: error: {error}")
        return True
    except KeyboardInterrupt:
        watch.read()
        return False
    finally:
        acceptance.note(watch)
        if front is not None and keeper.away:
            front.give_up()


def _watch(engine: Engine) -> AcceptanceWatch:
    return AcceptanceWatch(engine.base_url, engine.gamma, adaptive=engine.config.adaptive)


def _wait_for_death(engine: Engine, watch: AcceptanceWatch) -> None:
    while not engine.is_dead():
        with suppress(EngineError):  # it has died since: the next look sees it
            engine.check()
        watch.look()
        time.sleep(WATCH_S)
