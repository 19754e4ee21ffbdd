"""What goes between ingress, replicas and the weights' keeper over Ray; plain values that pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from laguna_serve.serving.gateway.engines.digests import Digests
from laguna_serve.serving.gateway.engines.engine import UNVERSIONED
from laguna_serve.serving.kit.results import JsonObject

Headers = list[tuple[bytes, bytes]]
# Of a prompt, for the router: it remembers prompts by their beginnings.
MAX_PROMPT_CHARS = 32_768
BASE = (UNVERSIONED[0].decode(), UNVERSIONED[1].decode())


@dataclass(frozen=True)
class Ask:
    """A request for a model's engine.

    `target` is path and query; `prompt` is what Ray's prefix router looks at, never empty, as it divides by its length.
    """

    method: str
    target: str
    headers: Headers
    body: bytes
    prompt: str


@dataclass(frozen=True)
class AnswerHead:
    """The head of an answer; the pieces of its body follow it."""

    status: int
    headers: Headers

    @property
    def streamed(self) -> bool:
        """Whether the body is a stream of events."""
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


@dataclass(frozen=True)
class Version:
    """Weights of a model and its drafter, as bodies of `/update_weights`; without bodies the checkpoint's own.

    `epoch` counts updates that all replicas took, so that a name may be given twice, and those in which all were lost.
    With `digests` whoever takes it must show the same as the others.
    """

    epoch: int = 0
    weight_version: str = BASE[0]
    update: Sequence[JsonObject] = ()
    draft_version: str = BASE[1]
    draft_update: Sequence[JsonObject] = ()
    digests: bool = False

    def follow(self, new: NewWeights) -> Version:
        """Return the version after an update: what that does not bring stays."""
        model = (new.weight_version or self.weight_version, new.update) if new.update else None
        draft = (new.draft_version or self.draft_version, new.draft_update) if new.draft_update else None
        return Version(
            self.epoch + 1,
            *(model or (self.weight_version, self.update)),
            *(draft or (self.draft_version, self.draft_update)),
            digests=new.digests,
        )


@dataclass(frozen=True)
class NewWeights:
    """An update: new weights of a model, of its drafter, or of both; with `digests` replicas must show the same."""

    update: Sequence[JsonObject] = ()
    weight_version: str | None = None
    draft_update: Sequence[JsonObject] = ()
    draft_version: str | None = None
    digests: bool = False


@dataclass(frozen=True)
class Told:
    """What a replica says of its weights.

    Attributes:
        engine: how its engine was started; only those that were started alike can be compared.
        ranks: digests, a rank after the other; none where it cannot tell.
        fault: why it cannot.
    """

    engine: str
    ranks: Sequence[Digests] = ()
    fault: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a replica says to a step of an update. `error` is None where it has done it, `told` where nobody asked."""

    replica: str
    error: str | None = None
    told: Told | None = None


@dataclass(frozen=True)
class ReplicaState:
    """Where a replica is, the epoch of its weights, None in the middle of an update, and their digests if asked for."""

    replica: str
    node: str
    pid: int
    url: str
    epoch: int | None
    told: Told | None = None


@dataclass(frozen=True)
class UpdateReport:
    """What became of an update.

    Attributes:
        outcome: "updated"; "unchanged": nothing was touched; "rolled_back": all have the weights from before again;
            "reduced": so have some, the others are being replaced.
        errors: by replica; in one that is "updated", what was lost, and which could not tell their digests.
        replicas: that took part.
        seconds: from the pause to the end.
    """

    outcome: str
    model: str
    weight_version: str
    draft_version: str
    replicas: int
    seconds: float
    errors: Mapping[str, str] = field(default_factory=dict)


def read_prompt(body: Mapping[str, object], path: str) -> str:
    """Read the text that a request begins with, or something in its place that is the same for equal requests."""
    given = body.get("messages", body.get("prompt", body.get("input")))
    if given is None or given in ("", []):
        return path
    return (given if isinstance(given, str) else json.dumps(given))[:MAX_PROMPT_CHARS]
