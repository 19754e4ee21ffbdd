"""The calibrated graph: which sets of ranks a decode comes by, counted on other prompts.

The open positions are ranked by a source's logits, and a node is a set of ranks that are committed on top of the
current state. Of all sets that were seen those are kept that serve most decodes *after* those already kept, as a state
is only reached through the ones before it.

Source: the idea is that of arXiv:2509.18085 (Spiffy); selection and table are ours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from laguna_serve.plugins.diffusion.decoding.canvas import State
from laguna_serve.plugins.diffusion.decoding.reference import Ranking
from laguna_serve.plugins.diffusion.errors import DiffusionError

Node = tuple[int, ...]
DEPTH = 6


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes, each a rising tuple of ranks, and the share of decodes that come by each; the likeliest first."""

    nodes: tuple[Node, ...]
    chances: tuple[float, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"nodes": self.nodes, "chances": self.chances}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read what `save` wrote.

        Raises:
            DiffusionError: it is no graph.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            graph = cls(
                tuple(tuple(map(int, node)) for node in content["nodes"]), tuple(map(float, content["chances"]))
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiffusionError(f"{path}: expected a calibrated graph, got {error!r}; calibrate again") from None
        if len(graph.nodes) != len(graph.chances) or any(not node or min(node) < 0 for node in graph.nodes):
            raise DiffusionError(f"{path}: expected a chance for every set of ranks, got others; calibrate again")
        return graph


def trace_path(state: State, ranking: Ranking, followers: Sequence[State]) -> list[Node]:
    """Express the states after `state` as sets of its ranks, up to the first that commits another token or block."""
    path: list[Node] = []
    places = {at: place for place, at in enumerate(ranking.positions)}
    for follower in followers[:DEPTH]:
        committed = [at for at, (before, after) in enumerate(zip(state, follower, strict=True)) if before != after]
        if any(at not in places or ranking.tokens[places[at]] != follower[at] for at in committed):
            break
        path.append(tuple(sorted(places[at] for at in committed)))
    return path


def choose_nodes(paths: Sequence[Sequence[Node]], most: int) -> Graph:
    """Choose up to `most` nodes, each the one that most paths come to next, of equal ones the lowest."""
    at = [0] * len(paths)
    nodes: list[Node] = []
    chances: list[float] = []
    while len(nodes) < most:
        following = Counter(path[place] for path, place in zip(paths, at, strict=True) if place < len(path))
        if not following:
            break
        node = min(following, key=lambda node: (-following[node], node))
        nodes.append(node)
        chances.append(following[node] / len(paths))
        at = _follow(paths, at, set(nodes))
    return Graph(tuple(nodes), tuple(chances))


def _follow(paths: Sequence[Sequence[Node]], at: list[int], nodes: set[Node]) -> list[int]:
    moved = []
    for path, start in zip(paths, at, strict=True):
        place = start
        while place < len(path) and path[place] in nodes:
            place += 1
        moved.append(place)
    return moved
