"""What a configuration needs of the limit of open files: two per stream."""

from __future__ import annotations

import logging

from laguna_serve.serving.gateway.config import Config

# Besides streams: listeners, log, health checks, scrapes, shadows.
RESERVE = 64
# And for each of several processes what all of them inherit: its listeners, bell and socket for questions.
INHERITED = 5
logger = logging.getLogger(__name__)


def count_slots(config: Config) -> int:
    """Count the requests that may be in all engines at once."""
    return sum(upstream.max_in_flight for model in config.models for upstream in model.upstreams)


def find_reserve(config: Config) -> int:
    """Find how many are needed besides streams."""
    workers = config.server.workers
    return RESERVE + (INHERITED * workers if workers > 1 else 0)


def find_max_connections(config: Config, limit: int) -> int:
    """Find how many connections of clients leave enough for those to engines, or half where the limit is low."""
    spare = max(limit - find_reserve(config), 2)
    return spare - min(count_slots(config), spare // 2)


def warn_if_low(config: Config, limit: int) -> None:
    """One line where the engines' slots cannot all be used."""
    needed = 2 * count_slots(config) + find_reserve(config)
    if limit < needed:
        logger.warning(
            "open files: expected a limit of at least %d for max_in_flight %d in all (two per stream), got %d; raise"
            " the hard limit (ulimit -Hn, LimitNOFILE=) or lower max_in_flight",
            needed,
            count_slots(config),
            limit,
        )
