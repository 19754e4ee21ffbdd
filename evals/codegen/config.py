"""The configuration of code_tasks.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laguna_serve.evals.problems import SHIPPED
from laguna_serve.evals.problems.mbpp_splits import Split
from laguna_serve.evals.problems.problem import Form
from laguna_serve.evals.problems.protocols import CPU_S, PROTOCOLS, SLOW_CPU_S, ProtocolName
from laguna_serve.evals.problems.template import TemplateFields, Thinking, make_template
from laguna_serve.evals.sandbox import Wanted
from laguna_serve.evals.sandbox.choice import HELP
from laguna_serve.serving.kit.flags import MOST_SEED, Flag, FlagError, check_bounds
from laguna_serve.serving.kit.results import JsonObject

# Of a limit: the kernel takes no more seconds, or bytes, than fit into 63 bits.
MOST = (1 << 31) - 1
MAX_TOKENS = ", ".join(f"{name} {protocol.max_tokens}" for name, protocol in PROTOCOLS.items())


@dataclass(frozen=True, kw_only=True)
class CodeTasksConfig:
    """Which problems are asked of whom, how, and how the programs are run.

    `base_url` and `out` are needed unless `check_canonical`.
    """

    base_url: Annotated[str | None, Flag("OpenAI-compatible endpoint, with or without /v1", metavar="URL")] = None
    problems: Annotated[
        Path, Flag("one of the files below (default: the problems that ship with the project)", metavar="FILE")
    ] = SHIPPED
    split: Annotated[Split | None, Flag("of MBPP's files (default: all rows)")] = None
    limit: Annotated[int | None, Flag("only the first N problems", metavar="N", at_least=1)] = None
    only: Annotated[tuple[str, ...], Flag("only these problems, by task id", metavar="ID", several=True)] = ()
    protocol: Annotated[ProtocolName | None, Flag("prompts and stop words, see below")] = None
    prompt_file: Annotated[
        Path | None,
        Flag("of CRUXEval: a prompt in place of the project's, with {code} and {input} in it", metavar="FILE"),
    ] = None
    model: Annotated[str | None, Flag("model to ask for (default: the first that is served)", metavar="NAME")] = None
    form: Annotated[Form, Flag("default: chat")] = "chat"
    thinking: Thinking = None
    chat_template_kwargs: TemplateFields = None
    samples: Annotated[int, Flag("per problem (default: 1)", metavar="N", at_least=1)] = 1
    temperature: Annotated[float, Flag("default: 0, greedy", metavar="T")] = 0.0
    k: Annotated[tuple[int, ...], Flag("for pass@k (default: 1)", metavar="K,…")] = (1,)
    max_tokens: Annotated[
        int | None,
        Flag(f"of an answer, thoughts included (default: the protocol's, {MAX_TOKENS})", metavar="N", at_least=1),
    ] = None
    seed: Annotated[
        int, Flag("of the first sample; the next has the next (default: 0)", at_least=0, at_most=MOST_SEED)
    ] = 0
    concurrency: Annotated[int, Flag("requests in flight (default: 8)", metavar="N", at_least=1)] = 8
    api_key_env: Annotated[str | None, Flag("environment variable that holds the endpoint's key", metavar="NAME")] = (
        None
    )
    timeout_s: Annotated[
        int | None,
        Flag(
            f"CPU seconds that a program gets (default: {CPU_S}; of evalplus's files {SLOW_CPU_S})",
            metavar="S",
            at_least=1,
            at_most=MOST,
        ),
    ] = None
    memory_mib: Annotated[
        int, Flag("MiB of address space that a program gets (default: 512)", metavar="N", at_least=1, at_most=MOST)
    ] = 512
    packages: Annotated[
        tuple[str, ...],
        Flag(
            "installed packages that programs may import, as numpy (with --memory-mib 1024 or more)",
            metavar="NAME",
            several=True,
        ),
    ] = ()
    skip_probes: Annotated[bool, Flag("do not try universal wrong answers on the problems first")] = False
    walls: Annotated[Wanted, Flag(HELP, old_switches=(("--without-namespaces", "none"),))] = "auto"
    check_canonical: Annotated[bool, Flag("grade the problems' own solutions instead of a model's; asks nobody")] = (
        False
    )
    out: Annotated[
        Path | None,
        Flag(
            "folder for answers, grades and the result files (with --check-canonical, if wanted: canonical.json)",
            metavar="DIR",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what means nothing. Raises FlagError."""
        check_bounds(self)
        if self.check_canonical:
            return
        if not self.base_url or self.out is None:
            raise FlagError("expected --base-url and --out, got none; give both, or --check-canonical")
        if not self.base_url.startswith(("http://", "https://")):
            raise FlagError(f"--base-url: expected http://… or https://…, got {self.base_url}")
        if self.template and self.form != "chat":
            raise FlagError("--thinking: expected --form chat with it, got completion: a raw prompt has no template")
        if not 0 <= self.temperature < float("inf"):
            raise FlagError(f"--temperature: expected 0 or more, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            got = f"got {self.samples} of the same; give --temperature"
            raise FlagError(f"--samples: expected 1 at temperature 0, {got}")
        if not self.k or not 1 <= min(self.k) <= max(self.k) <= self.samples:
            raise FlagError(f"--k: expected 1 to --samples ({self.samples}), got {','.join(map(str, self.k))}")
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise FlagError(f"--api-key-env: expected the key in ${self.api_key_env}, got nothing; set it")

    @property
    def template(self) -> JsonObject:
        """Fields for the chat template."""
        return make_template(self.thinking, self.chat_template_kwargs)
