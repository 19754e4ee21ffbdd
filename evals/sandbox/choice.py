"""Which walls programs get on this system: the first that can be had, or those that were asked for, or a refusal."""

from __future__ import annotations

from typing import Literal, get_args

from laguna_serve.evals.sandbox.supervisor import REMEDY, find_obstacle
from laguna_serve.evals.sandbox.trial import WallError, Walls

Wanted = Literal["auto", "namespaces", "bubblewrap", "landlock", "none"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)
IN_ORDER: tuple[Walls, ...] = ("namespaces", "bubblewrap", "landlock")
NO_WALLS_WARNING = (
    "warning: without walls the model's programs can read and write the files that you can, and forge their verdicts;"
    " do this on a throwaway machine only"
)
HELP = (
    "what keeps programs from your files and processes: namespaces, bubblewrap or landlock; auto, the first of them"
    " that works here; or none (default: auto)"
)


def choose_walls(wanted: Wanted = "auto") -> Walls:
    """Choose the walls to use; "none" only where that was asked for.

    Raises:
        WallError: none of those that are wanted can be had here; the message says why, and what to do.
    """
    if wanted == "none":
        return wanted
    obstacles = []
    for walls in IN_ORDER if wanted == "auto" else (wanted,):
        obstacle = find_obstacle(walls)
        if obstacle is None:
            return walls
        obstacles.append(f"{walls}: {obstacle}")
    raise WallError(f"{'; '.join(obstacles)}; {REMEDY}")
