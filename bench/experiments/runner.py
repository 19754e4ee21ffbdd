"""Runs a campaign's steps one after the other, and writes down each as it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from laguna_serve.bench.experiments.checkpoints import write_checkpoints
from laguna_serve.bench.experiments.figures import FiguresError, extract_figures
from laguna_serve.bench.experiments.options import CampaignConfig, identify
from laguna_serve.bench.experiments.plan import (
    BUDGET_ENDED,
    PlanError,
    choose_steps,
    group_runs,
    is_finished,
    make_plan,
)
from laguna_serve.bench.experiments.process import Ending, read_tail, run_process
from laguna_serve.bench.experiments.report import render_markdown
from laguna_serve.bench.experiments.result import CampaignResult, Outcome, StepRun
from laguna_serve.bench.experiments.step import MADE, ROOT, Step, fill, list_named, list_places, shorten_command
from laguna_serve.serving.kit.cli import FELL_SHORT, HELD
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.results import write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, hold_folder

JOURNAL = "campaign.jsonl"
# On a CPU: a step of a rehearsal that hangs.
REHEARSAL_LIMIT_S = 400.0
TRACEBACK = "Traceback (most recent call last):"
OUTCOMES: dict[int, Outcome] = {HELD: "held", FELL_SHORT: "fell short"}
Say = Callable[[str], None]


@dataclass
class Campaign:
    """One run of the command: its folder, what was done there before, and the time that is left."""

    config: CampaignConfig
    out: Path
    environment: Environment
    say: Say
    journal: Journal[StepRun]
    left_out: dict[str, str] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    interrupted: bool = False

    @property
    def used_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.started_s

    def list_runs(self) -> dict[str, list[StepRun]]:
        """Earlier attempts by step, in order, at the same checkpoints."""
        return group_runs(self.config, self.journal.entries)


def open_campaign(config: CampaignConfig, environment: Environment, say: Say, held: ExitStack) -> Campaign:
    """Open the folder and its journal, after everything that can be refused; it is this process's while `held` is.

    Raises:
        PlanError: no GPU, or no such step; RunDirError: a folder can be none, or is another's;
        CheckpointError: no such checkpoint; JournalError: its journal cannot be read.
    """
    out = config.out
    assert out is not None, "checked with the flags"
    choose_steps(config)
    check_out(out)
    if config.checkpoints is not None:
        check_out(config.checkpoints, "--checkpoints")
    config.identify_given()
    device = environment.device
    if not config.rehearse and (device is None or device.kind != "gpu"):
        remedy = "run it there, or see --plan, or --rehearse the same steps at toy size"
        raise PlanError(f"device: expected an NVIDIA GPU that the installed vLLM uses, got none; {remedy}")
    claim_folder(out, {"campaign": "rehearsal" if config.rehearse else "gpu"})
    held.enter_context(hold_folder(out))
    (out / "steps").mkdir(exist_ok=True)
    return Campaign(config, out, environment, say, Journal(out / JOURNAL, StepRun, say))


def run_campaign(campaign: Campaign) -> CampaignResult:
    """Run what is planned and fits, publishing the result after each step; Ctrl-C and the budget's end keep all."""
    config = campaign.config
    steps = {step.name: step for step in choose_steps(config)}
    checkpoints = config.made_up or campaign.out / "checkpoints"
    if any(place in word for step in steps.values() for word in step.command for place in MADE):
        write_checkpoints(checkpoints, small=config.rehearse)
    tried: set[str] = set()
    while not campaign.interrupted:
        due = find_due(campaign, tried)
        if not due or campaign.used_s >= campaign.config.budget_s:
            break
        about = f"{due[0]} ({len(tried) + 1} of {len(tried) + len(due)}, about {steps[due[0]].estimate_s} s on an H100)"
        campaign.say(about)
        tried.add(due[0])
        run_step(campaign, steps[due[0]], checkpoints)
        publish(campaign)
    ended = "interrupted" if campaign.interrupted else BUDGET_ENDED
    campaign.left_out |= dict.fromkeys(find_due(campaign, tried), ended)
    return publish(campaign)


def find_due(campaign: Campaign, tried: Set[str]) -> list[str]:
    """Find the steps that are still to be run and fit; of those that do not, `left_out` gets the reasons.

    Planned anew each time: a step that was quick leaves room for one that did not fit.
    """
    runs = campaign.list_runs()
    plan = make_plan(campaign.config, runs, campaign.config.budget_s - campaign.used_s)
    missing = [
        item for item in plan.steps if item.step not in tried and not is_finished(item.step, runs, campaign.config)
    ]
    campaign.left_out = {item.step: item.left_out for item in missing if item.left_out is not None}
    return [item.step for item in missing if item.left_out is None]


def run_step(campaign: Campaign, step: Step, checkpoints: Path) -> None:
    """Run one step, and add what came of it to the journal."""
    config = campaign.config
    used = {run.folder for run in campaign.journal.entries if run.step == step.name}
    folder = choose_folder(step, campaign.list_runs().get(step.name, []), used, campaign.environment)
    out = campaign.out / "steps" / folder
    out.mkdir(parents=True, exist_ok=True)
    log = out.with_name(f"{folder}.log")
    given = config.list_given()
    template = step.rehearsal if config.rehearse else step.command
    named = list_named(template, given)
    identified = config.identify_given()
    command = fill(template, list_places(out.resolve(), checkpoints.resolve(), given))
    started = datetime.now(UTC).isoformat(timespec="seconds")
    left_s = max(1.0, config.budget_s - campaign.used_s)
    own_limit_s = REHEARSAL_LIMIT_S if config.rehearse else float(step.limit_s)
    log.unlink(missing_ok=True)
    ending = run_process(command, log, min(left_s, own_limit_s), ROOT)
    campaign.interrupted = ending.stopped_by == "person"
    outcome, reason = judge(ending, log, by_budget=left_s < own_limit_s)
    # Prescribed acceptance is not rehearsed: there answers must not differ.
    if step.falls_short and outcome == "fell short" and not (step.synthetic and config.rehearse):
        outcome = "held"
    schema: str | None = None
    figures: list[str] = []
    try:
        schema, figures = extract_figures(find_result(step, out, log))
    except FiguresError as error:
        reason = reason or str(error)
        outcome = "failed" if outcome == "held" and step.result else outcome
    # What only a hub had is in its cache now.
    fetched = {name: identify(given[name]) for name in named if identified[name] == given[name]}
    run = StepRun(
        step=step.name,
        outcome=outcome,
        status=ending.status,
        device=campaign.environment.device_name,
        rehearsed=config.rehearse,
        commit=campaign.environment.git_commit,
        started=started,
        wall_s=round(ending.wall_s, 1),
        estimate_s=step.estimate_s,
        command=shorten_command(command, campaign.out),
        folder=f"steps/{folder}",
        schema=schema,
        figures=figures,
        reason=reason,
        checkpoints={name: identified[name] for name in named} | fetched,
    )
    campaign.journal.append(run)
    said = "; ".join(figures[:3]) or reason or ""
    campaign.say(f"  {outcome} after {run.wall_s:.0f} s: {said}")


def judge(ending: Ending, log: Path, *, by_budget: bool) -> tuple[Outcome, str | None]:
    """Judge the outcome of a process, and why it is not "held"."""
    if ending.stopped_by == "person":
        return "stopped", "interrupted"
    if ending.stopped_by == "limit":
        return ("stopped", BUDGET_ENDED) if by_budget else ("timed out", f"stopped after {ending.wall_s:.0f} s")
    outcome = OUTCOMES.get(ending.status if ending.status is not None else -1, "failed")
    tail = read_tail(log)
    if outcome == "fell short" and has_crashed(tail):  # Python ends with the same status
        return "failed", tail[-1][:300]
    if outcome != "failed":
        return outcome, None
    return outcome, f"exit status {ending.status}" + (f": {tail[-1][:300]}" if tail else "")


def has_crashed(tail: Sequence[str]) -> bool:
    """Whether a log ends in a traceback: no result, and no summary of tests, was printed behind it."""
    last = max((number for number, line in enumerate(tail) if line.startswith(TRACEBACK)), default=None)
    return last is not None and not any(line.startswith(("{", "=")) for line in tail[last:])


def choose_folder(step: Step, runs: Sequence[StepRun], used: Collection[str], environment: Environment) -> str:
    """Choose where an attempt runs: a stopped step continues on the same device and code, any other begins afresh.

    `runs`: attempts at the same checkpoints; `used`: the folders of all.
    """
    here = (environment.device_name, environment.git_commit)
    if runs and runs[-1].outcome == "stopped" and (runs[-1].device, runs[-1].commit) == here:
        return runs[-1].folder.rpartition("/")[2]
    return f"{step.name}-{len(used) + 1}" if used else step.name


def find_result(step: Step, out: Path, log: Path) -> Path:
    """Find the step's result file; where there is none, the last JSON line that it printed is made one."""
    if step.result:
        return out / step.result
    path = out / "result.json"
    line = next((line for line in reversed(read_tail(log)) if line.startswith('{"')), None)
    if line is not None and "schema" in json.loads(line):
        write_text(path, line + "\n")
    return path


def publish(campaign: Campaign) -> CampaignResult:
    """Write campaign.json and campaign.md."""
    result = CampaignResult(
        environment=campaign.environment,
        rehearsed=campaign.config.rehearse,
        budget_s=campaign.config.budget_s,
        used_s=round(campaign.used_s, 1),
        runs=list(campaign.journal.entries),
        left_out=campaign.left_out,
        interrupted=campaign.interrupted,
    )
    write_result(campaign.out / "campaign.json", result)
    write_text(campaign.out / "campaign.md", render_markdown(result))
    return result
