"""vLLM's routes for weights, and in which order they must be called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

START = "default"
STARTS = ("/start_weight_update", "/start_draft_weight_update")
UPDATE, FINISH, RENAME = "/update_weights", "/finish_weight_update", "/update_weight_version"
STEPS = ("/pause", "/resume", *STARTS, UPDATE)
RESET, VERSION = "/reset_prefix_cache", "/weight_info"
ROUTES = (*STEPS, FINISH, RESET, RENAME)


class Weights:
    """The weights of an engine.

    As in vLLM one update goes on at a time: it must be started, and ends when it is finished or a part of it fails.

    A `lax` one takes every step at any time, a `deaf` one keeps its version. `fail` names the routes that answer 500,
    `fail_once` those that do the first time. `calls` are the routes that were called, with their queries; `loaded` is
    what was sent.
    """

    def __init__(self, *, lax: bool = False, deaf: bool = False) -> None:
        self.lax, self.deaf = lax, deaf
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.fail_once: set[str] = set()
        self.version = START
        self.loaded: list[Any] = []
        self.started = False

    def take(self, target: str, body: Mapping[str, Any]) -> bool:
        """A step, by its path and query. False where it fails."""
        route = target.partition("?")[0]
        self.calls.append(target)
        fails = route in self.fail | self.fail_once
        self.fail_once.discard(route)
        if fails or not (self.lax or self._is_in_order(route, body)):
            if route == UPDATE:
                self.started = False
            return False
        if route in STARTS:
            self.started = True
        elif route == UPDATE:
            self.loaded.append(body["update_info"])
        elif route == FINISH:
            self.started = False
        if not self.deaf:
            self.version = body.get("weight_version") or body.get("new_version") or self.version
        return True

    @property
    def paused(self) -> bool:
        steps = [call.partition("?")[0] for call in self.calls if call.startswith(("/pause", "/resume"))]
        return steps[-1:] == ["/pause"]

    def _is_in_order(self, route: str, body: Mapping[str, Any]) -> bool:
        if route in STARTS:
            return not self.started
        return (self.started or route not in (UPDATE, FINISH)) and body.get("update_info") != {}
