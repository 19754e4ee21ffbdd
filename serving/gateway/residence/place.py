"""What a request holds of a model until it ends."""

from __future__ import annotations

from dataclasses import dataclass

from laguna_serve.serving.gateway.residence.model import Ticket
from laguna_serve.serving.gateway.residence.owner import Owner


@dataclass(frozen=True, slots=True)
class Place:
    """A place among those that a model is granted to, or among those that wait for it."""

    owner: Owner
    ticket: Ticket

    def leave(self) -> None:
        """Give the place back."""
        self.owner.leave(self.ticket)
