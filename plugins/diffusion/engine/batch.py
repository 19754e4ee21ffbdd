"""The requests that share passes: they join and leave between two of them, and one that fails leaves alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from laguna_serve.plugins.diffusion.decoding.likelihoods import Likelihood
from laguna_serve.plugins.diffusion.engine.requests import Reason, Request
from laguna_serve.plugins.diffusion.proposing.interface import Run
from laguna_serve.plugins.diffusion.speculation import Decoder

# Passes in a row of which no request came out: what is broken is not a request.
MAX_FAILED = 3
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A request in the batch. `sent`: how many tokens of its answer were given out."""

    request: Request
    run: Run
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Advance:
    """What a pass brought to a request: new tokens, and where it has ended, why."""

    job: Job
    tokens: tuple[int, ...]
    reason: Reason | None = None
    error: str | None = None
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """What has been done so far, over all requests.

    Attributes:
        steps: of the references.
        positions: that the target evaluated.
        committed: tokens, with or without a gap before them.
        visits: of a request to a pass of the target.
        proposed, accepted: states beside the current ones, and those that decodes came by.
    """

    steps: int = 0
    positions: int = 0
    committed: int = 0
    visits: int = 0
    proposed: int = 0
    accepted: int = 0


class Batch:
    """Jobs that are advanced together, each by its own reference."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.jobs: list[Job] = []
        self.totals = Totals()
        self._failed = 0

    def add(self, request: Request) -> Job:
        """Add a request to the next pass."""
        job = Job(request, Run.begin(request.canvas, request.reference, request.stop, request.limit, request.listed))
        self.jobs.append(job)
        return job

    def remove(self, job: Job) -> None:
        """Take a request out; what was kept for it is free with it."""
        self.jobs.remove(job)

    def advance(self) -> list[Advance]:
        """Run one pass; requests that have ended by it are taken out.

        Raises:
            Exception: of the model, when nothing has come out of several passes in a row.
        """
        if not self.jobs:
            return []
        before = [_count(job.run) for job in self.jobs]
        rows = self.decoder.predictor.rows
        errors = self._run_pass(self.jobs)
        after = [_count(job.run) for job in self.jobs]
        changed = [sum(new) - sum(old) for new, old in zip(_columns(after), _columns(before), strict=True)]
        self._add_up(self.decoder.predictor.rows - rows, changed)
        advances = [self._describe(job, errors.get(job)) for job in self.jobs]
        self.jobs = [advance.job for advance in advances if advance.reason is None]
        return advances

    def _run_pass(self, jobs: Sequence[Job]) -> dict[Job, Exception]:
        """Advance the jobs together, or each by itself where that fails; returns why some of them could not be."""
        try:
            self.decoder.advance([job.run for job in jobs])
        except Exception:
            logger.exception("a pass over %d requests failed; each is tried by itself", len(jobs))
            return self._run_each(jobs)
        self._failed = 0
        return {}

    def _run_each(self, jobs: Sequence[Job]) -> dict[Job, Exception]:
        """Advance each job in a pass of its own, without proposals, which may have been what failed."""
        errors: dict[Job, Exception] = {}
        for job in jobs:
            try:
                if job.run.find_end() is None:
                    self.decoder.advance([job.run], alone=True)
            except Exception as error:
                errors[job] = error
        self._failed = self._failed + 1 if len(errors) == len(jobs) else 0
        if self._failed >= MAX_FAILED:
            raise next(iter(errors.values()))
        return errors

    def _add_up(self, rows: int, changed: Sequence[int]) -> None:
        steps, visits, proposed, accepted, masks = changed
        old = self.totals
        self.totals = Totals(
            steps=old.steps + steps,
            positions=old.positions + rows,
            committed=old.committed - masks,
            visits=old.visits + visits,
            proposed=old.proposed + proposed,
            accepted=old.accepted + accepted,
        )

    def _describe(self, job: Job, error: Exception | None) -> Advance:
        if error is not None:
            return Advance(job, (), "error", f"{type(error).__name__}: {error}")
        answer = job.run.read_answer()
        new = range(job.sent, len(answer))
        tokens, job.sent = answer[job.sent :], len(answer)
        likelihoods = tuple(job.run.likelihoods[at] for at in new) if job.request.listed is not None else ()
        reason: Reason | None = None
        if job.run.find_end() is not None:
            reason = "stop" if answer and answer[-1] in job.request.stop else "length"
        return Advance(job, tokens, reason, likelihoods=likelihoods)


def _count(run: Run) -> tuple[int, ...]:
    """Count what a pass changes: steps, passes, proposals and those accepted, masks."""
    return run.steps, run.passes, run.proposed, run.accepted, run.state.count(run.canvas.mask_id)


def _columns(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(zip(*rows, strict=True))
