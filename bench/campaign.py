"""Everything that waits for a GPU, in order of worth, within a budget of minutes, by one command.

Kernels first, then engines on the toy family, then XS.2's full size with random weights (acceptance prescribed, and
labelled synthetic), then the published weights where they are given. A step is one of this project's own commands, in a
process group of its own with a time limit; DIR gets a journal, the steps' logs and raw results as they come, and
campaign.md and campaign.json (schema laguna_serve.campaign/1). The same command continues: what is finished is not run
again, on whichever machine. The list: bench/results/GPU_TODO.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from laguna_serve.bench.experiments.options import CampaignConfig
from laguna_serve.bench.experiments.plan import group_runs, make_plan
from laguna_serve.bench.experiments.report import render_plan, render_text, render_todo
from laguna_serve.bench.experiments.result import CampaignPlan, CampaignResult, StepRun
from laguna_serve.bench.experiments.runner import JOURNAL, open_campaign, run_campaign
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD, INTERRUPTED, print_result, run_command
from laguna_serve.serving.kit.environment import current_argv, read_environment
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import read_flags_and_json
from laguna_serve.serving.kit.journal import Journal
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import JsonObject, to_json
from laguna_serve.serving.kit.run_dir import check_out, check_out_file

__all__ = ["CampaignConfig", "CampaignResult", "main", "plan_campaign", "run"]
EXAMPLES = """
examples:
  python bench/campaign.py --plan                                  what fits into 25 minutes of one H100, and what not
  python bench/campaign.py --budget-min 25 --out out/campaign      run it; the same again continues, elsewhere, too
  python bench/campaign.py --part kernels --budget-min 10 --out out/campaign
  python bench/campaign.py --step xs2-acceptance --xs2 poolside/Laguna-XS.2 \\
      --xs2-draft poolside/Laguna-XS.2-speculator.dflash --budget-min 60 --out out/campaign
  python bench/campaign.py --rehearse --out out/rehearsal          the same steps at toy size on a CPU

exit status:
  0    held: everything that was run to its end held; what the budget left out is no failure
  1    fell short: a step fell short, failed or ran out of its own time
  2    could not run: no GPU, no such step, or a folder of another kind of campaign
  130  interrupted: what is finished is kept, and the same command continues
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    config, always_json = read_flags_and_json(
        CampaignConfig, argv, prog="bench/campaign.py", description=__doc__, epilog=EXAMPLES
    )

    def act() -> int:
        if config.write_todo is not None:
            check_out_file(config.write_todo, "--write-todo")
            write_text(config.write_todo, render_todo())
            return HELD
        if config.plan:
            plan = plan_campaign(config)
            print_result(render_plan(plan), to_json(plan), None, always_json=always_json)
            return HELD
        result = run(config)
        print_result(render_text(result), shorten(result), config.out, always_json=always_json)
        return INTERRUPTED if result.interrupted else HELD if result.held else FELL_SHORT

    return run_command("campaign.py", act, interrupted=CONTINUES)


def plan_campaign(config: CampaignConfig) -> CampaignPlan:
    """Plan what would run within the budget, after what the journal in `config.out` has of it.

    Raises:
        PlanError: there is no such step; RunDirError: the folder can be none; JournalError: the journal cannot be read.
    """
    runs: dict[str, list[StepRun]] = {}
    if config.out is not None:
        check_out(config.out)
        runs = group_runs(config, Journal(config.out / JOURNAL, StepRun).entries)
    return make_plan(config, runs)


def run(config: CampaignConfig) -> CampaignResult:
    """Run the steps that are missing and fit, and write the result after each of them.

    Raises:
        PlanError, RunDirError, JournalError: before anything is run.
    """
    environment = read_environment(current_argv())
    with contextlib.ExitStack() as held:
        return run_campaign(open_campaign(config, environment, Progress().say, held))


def shorten(result: CampaignResult) -> JsonObject:
    """Shorten a result to one line: of each step its outcome, its seconds and its figures."""
    runs = {
        name: {"outcome": done.outcome, "wall_s": done.wall_s, "figures": done.figures}
        for name, done in result.last_runs.items()
    }
    return to_json(result) | {"runs": runs}


if __name__ == "__main__":
    raise SystemExit(main())
