"""The result of bench/cluster, schema laguna_serve.cluster/1."""

from __future__ import annotations

import msgspec

from laguna_serve.serving.kit.environment import Environment, cite_environment
from laguna_serve.serving.kit.tables import Table


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Answers against those of one engine by itself, by their token ids. `by_replica`: answers that each gave."""

    prompts: int
    differing: int
    by_replica: dict[str, int]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over streamed requests one after the other, in ms: to the first event, and of the whole request."""

    requests: int
    first_event_ms: float
    whole_ms: float


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A request that a client saw fail. `after_s`: when it ended, from the kill; `events`: that had come by then."""

    after_s: float
    error: str
    events: int


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What clients without retries of their own saw when something was killed under load.

    Attributes:
        killed: what was.
        sent, failed: requests whose answers ended after the kill.
        longest_s: the longest of those that succeeded; `usual_s`: the median before the kill.
        recovered_s: from the kill until as many replicas as before said that they were well.
    """

    killed: str
    clients: int
    sent: int
    failed: int
    failures: list[Failure]
    longest_s: float
    usual_s: float
    recovered_s: float


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, two under load, one again: seconds from the load's begin, and from its end."""

    clients: int
    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float
    up_s: float
    down_s: float
    requests: int
    failed: int


class Updates(msgspec.Struct, frozen=True, kw_only=True):
    """New weights on all replicas: how long requests were held, and whether the answers are the new weights'.

    Attributes:
        seconds: of the update, on so many `replicas`.
        outcome: of it.
        after: answers against an engine that was started on the new weights.
        during: requests that were under way or came while it ran, and how many of them failed.
        late: the same of the replica alone that started after the update, with its `X-Weight-Version`.
        refused: the outcome of an update that cannot be loaded.
        refused_after: answers after that one, against the same engine.
    """

    replicas: int
    seconds: float
    outcome: str
    during: int
    during_failed: int
    after: Agreement
    late: Agreement
    late_version: str
    refused: str
    refused_after: Agreement


class ClusterResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.cluster/1"):
    """All of it. `left`: processes that were still there after the end."""

    environment: Environment
    ray: str
    openai: str
    model: str
    draft: str | None
    routing: str
    max_tokens: int
    start_s: float
    agreement: Agreement
    engine: Latency
    cluster: Latency
    losses: list[Loss]
    scaling: Scaling
    updates: Updates
    left: int

    @property
    def held(self) -> bool:
        """Whether all answers were right, everything came back, and nothing was left behind."""
        agreed = (self.agreement, self.updates.after, self.updates.late, self.updates.refused_after)
        outcomes = (self.updates.outcome, self.updates.refused) == ("updated", "rolled_back")
        return all(one.differing == 0 for one in agreed) and outcomes and self.left == 0


def list_rows(result: ClusterResult) -> list[tuple[str, str]]:
    """List what was measured, a line each."""
    updates, scaling = result.updates, result.scaling
    rows = [
        ("start of two replicas", f"{result.start_s:.1f} s"),
        ("answers of two replicas that differ from one engine's", _tell(result.agreement)),
        ("first event, one stream, engine / Ray", _pair(result.engine.first_event_ms, result.cluster.first_event_ms)),
        ("whole request, one stream, engine / Ray", _pair(result.engine.whole_ms, result.cluster.whole_ms)),
    ]
    for loss in result.losses:
        rows += [
            (f"{loss.killed} killed under {loss.clients} streams", f"{loss.failed} of {loss.sent} requests failed"),
            ("longest that succeeded / usual", f"{loss.longest_s:.1f} / {loss.usual_s:.1f} s"),
            ("as many replicas as before after", f"{loss.recovered_s:.1f} s"),
        ]
    rows += [
        (f"second replica under {scaling.clients} streams after", f"{scaling.up_s:.1f} s"),
        (f"one again without load after (delay {scaling.downscale_delay_s:g} s)", f"{scaling.down_s:.1f} s"),
        ("requests while it scaled", f"{scaling.failed} of {scaling.requests} failed"),
        (f"new weights on {updates.replicas} replicas", f"{updates.outcome} in {updates.seconds:.2f} s"),
        ("requests meanwhile", f"{updates.during_failed} of {updates.during} failed"),
        ("answers after it that differ from an engine's on those weights", _tell(updates.after)),
        (f"of a replica that started later (X-Weight-Version: {updates.late_version})", _tell(updates.late)),
        ("an update that cannot be loaded", updates.refused),
        ("answers after it that differ", _tell(updates.refused_after)),
        ("processes left", str(result.left)),
    ]
    return rows


def render_text(result: ClusterResult) -> str:
    """Render it for a terminal."""
    return Table("lr", ("measured", ""), list_rows(result)).to_text()


def render_markdown(result: ClusterResult) -> str:
    """Render it for a page, with where it was measured."""
    about = f"ray {result.ray}, openai {result.openai}, routing {result.routing}, {result.max_tokens} tokens an answer."
    table = Table("lr", ("measured", ""), list_rows(result)).to_markdown()
    where = cite_environment(result.environment)
    return f"# {result.model} on Ray Serve\n\n{table}\n\nOpenAI's client, no retries of its own; {about}\n\n{where}\n"


def _tell(one: Agreement) -> str:
    return f"{one.differing} of {one.prompts}"


def _pair(first: float, second: float) -> str:
    return f"{first:.1f} / {second:.1f} ms"
