"""The whole of it at toy scale: teacher → cache → student with a tokenizer of its own → ablation → served.

The teacher is served by vLLM and asked, in chats, to complete functions of Python's standard library. The student has
SmolLM3's shape and a vocabulary of 1,024, and has read the same library. After the ablation the full student is served
by vLLM in float32 and must give transformers' tokens.

Every stage goes on where it was stopped. It needs .venv-train (scripts/client_env.sh train).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import torch

from laguna_serve.scripts.dante.ablate import AblateConfig, ablate
from laguna_serve.scripts.dante.arms import FULL, SFT, AblationResult, Bar
from laguna_serve.scripts.dante.cache import CacheConfig, CacheResult, format_cache, make_cache
from laguna_serve.scripts.dante.page import format_ablation
from laguna_serve.scripts.dante.train import require_trainer
from laguna_serve.scripts.text import corpus
from laguna_serve.scripts.training.dante.records import Prompt as CachedPrompt
from laguna_serve.scripts.training.dante.records import read_cache
from laguna_serve.scripts.training.dante.rows import encode_prompt
from laguna_serve.scripts.training.dante.student import make_student
from laguna_serve.scripts.training.minutes import MINUTES, count_minutes
from laguna_serve.scripts.training.rl.service import TrainingService, open_service
from laguna_serve.serving.client.completions import Client, open_session
from laguna_serve.serving.client.errors import EndpointError
from laguna_serve.serving.client.records import Prompt
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.cli import CONTINUES, FELL_SHORT, HELD
from laguna_serve.serving.kit.command import Brief, Command
from laguna_serve.serving.kit.files import write_text
from laguna_serve.serving.kit.flags import MOST_THREADS, BoundedConfig, Flag, Quick
from laguna_serve.serving.kit.progress import Progress
from laguna_serve.serving.kit.results import read_result, write_result
from laguna_serve.serving.kit.run_dir import check_out, claim_folder, hold_folder, is_begun

ROOT = Path(__file__).resolve().parents[2]
LONGEST_HEAD = 240
LENGTH = 512
EXAMPLES = """examples:
  .venv-train/bin/python scripts/dante toy --out out/dante                20 minutes on two cores
  .venv-train/bin/python scripts/dante toy --quick --out out/dante-quick  a few steps of everything, to see it work

exit status: 0 every bar is met, 1 one is not (the table says which), 2 it could not run, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True)
class DanteToyConfig(BoundedConfig):
    """How much of everything."""

    QUICK: ClassVar = Quick(
        "24 prompts, 40 and 4 steps, one seed, two arms",
        {"prompts": 24, "held_out": 8, "max_tokens": 32, "base_steps": 40, "steps": 4, "batch": 8, "seeds": 1}
        | {"arms": (SFT, FULL)},
    )

    out: Annotated[Path, Flag("folder for everything that is made", metavar="DIR")]
    teacher: Annotated[Path, Flag("a Laguna checkpoint (default: tests/toy/teacher)")] = ROOT / "tests/toy/teacher"
    prompts: Annotated[int, Flag("that are taught (default 240)", metavar="N", at_least=2)] = 240
    held_out: Annotated[int, Flag("prompts to measure on (default 48)", metavar="N", at_least=2)] = 48
    max_tokens: Annotated[int, Flag("of the teacher's answers (default 64)", metavar="N", at_least=1)] = 64
    base_steps: Annotated[int, Flag("of the student before it is taught (default 400)", at_least=1)] = 400
    steps: Annotated[int, Flag("of teaching (default 48)", at_least=1)] = 48
    batch: Annotated[int, Flag("rows of a step (default 16)", at_least=1)] = 16
    lr: Annotated[float, Flag("peak of teaching (default 0.001)")] = 1e-3
    seeds: Annotated[int, Flag("default 3", at_least=1)] = 3
    arms: Annotated[tuple[str, ...], Flag("as in scripts/dante ablate", metavar="ARM,…")] = AblateConfig.arms
    threads: Annotated[int, Flag("of the processor, for training (default 1)", at_least=1, at_most=MOST_THREADS)] = 1


class ServedStudent(msgspec.Struct, frozen=True, kw_only=True):
    """The student behind vLLM: how many greedy tokens were compared with transformers', and how many answers differ."""

    model: str
    answers: int
    tokens: int
    different: int


class DanteToyResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.dante_toy/1"):
    """What was cached, what each part does, and whether the served student is the trained one."""

    cache: CacheResult
    held_out: CacheResult
    ablation: AblationResult
    served: ServedStudent
    bars: tuple[Bar, ...]
    minutes: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = Command("scripts/dante toy", DanteToyConfig, __doc__, EXAMPLES, interrupted=CONTINUES)
    return command.run(
        argv,
        prove,
        show=format_proof,
        line=Brief(without=("ablation.readings", "cache.edges", "cache.counts", "held_out.edges", "held_out.counts")),
        judge=lambda result: HELD if all(bar.met for bar in result.bars) else FELL_SHORT,
    )


def prove(config: DanteToyConfig) -> DanteToyResult:
    """Do what is missing of every stage, and write dante-toy.json.

    Raises:
        EngineError: vLLM does not start. RunDirError: --out holds another proof. Whatever the stages raise.
    """
    require_trainer()
    check_out(config.out)
    with hold_folder(config.out), count_minutes(config.out / MINUTES, lambda: is_begun(config.out)) as minutes:
        return _prove(config, minutes)


def _prove(config: DanteToyConfig, minutes: Callable[[], float]) -> DanteToyResult:
    """Do what is missing, alone in the folder."""
    settings = [config.prompts, config.held_out, config.max_tokens, config.base_steps, config.steps, config.batch]
    claim_folder(config.out, {"toy": [*settings, config.lr, str(config.teacher)]})
    modules = corpus.read_modules()
    cache, held_out = fill_caches(config, modules)
    base = config.out / "base"
    if not (base / "tokenizer.json").exists():
        make_student([m for m in modules if not m.held_out], base, config.base_steps, 0, config.threads)
    ablation = ablate(
        AblateConfig(
            model=base,
            cache=config.out / "cache",
            held_out=config.out / "held-out",
            out=config.out / "ablation",
            seeds=config.seeds,
            arms=config.arms,
            steps=config.steps,
            batch=config.batch,
            length=LENGTH,
            lr=config.lr,
            threads=config.threads,
        )
    )
    student = config.out / "ablation" / "students" / f"{config.arms[-1] if FULL not in config.arms else FULL}-0"
    prompts = [record.prompt for record in read_cache(config.out / "held-out")[:12]]
    served = serve_student(student, prompts, config.out / "engine-student.log")
    equal = Bar(
        what="answers of vLLM that differ from transformers'", measured=served.different, met=not served.different
    )
    result = DanteToyResult(
        cache=cache,
        held_out=held_out,
        ablation=ablation,
        served=served,
        bars=(*ablation.bars, equal),
        minutes=minutes(),
    )
    write_result(config.out / "dante-toy.json", result)
    return result


def format_proof(result: DanteToyResult) -> str:
    """Format cache, ablation and the served student for people."""
    served = result.served
    same = f"{served.answers - served.different} of {served.answers} answers, {served.tokens} tokens"
    return "\n\n".join(
        [
            format_cache(result.cache),
            format_ablation(result.ablation),
            f"vLLM gives transformers' tokens in {same} of {served.model}; {result.minutes} minutes in all",
        ]
    )


def fill_caches(config: DanteToyConfig, modules: list[corpus.Module]) -> tuple[CacheResult, CacheResult]:
    """Ask the teacher, served by vLLM behind the gateway, for what is taught and what is measured on."""
    folders = {"cache": False, "held-out": True}
    noted = [config.out / name / "cache.json" for name in folders]
    if not all(path.exists() for path in noted):
        for name, held_out in folders.items():
            chosen = [module for module in modules if module.held_out == held_out]
            count = config.held_out if held_out else config.prompts
            write_text(config.out / f"{name}.jsonl", list_prompts(chosen, count))
        engine = EngineConfig(model=str(config.teacher), dtype="float32", enforce_eager=True, max_num_seqs=40)
        with open_service(engine, config.out / "engine-teacher.log", Progress().say) as teacher:
            for name, held_out in folders.items():
                make_cache(
                    CacheConfig(
                        prompts=config.out / f"{name}.jsonl",
                        endpoint=teacher.base_url,
                        out=config.out / name,
                        max_tokens=config.max_tokens,
                        samples=0 if held_out else 4,
                    )
                )
    first, second = (read_result(path, CacheResult) for path in noted)
    return first, second


def list_prompts(modules: list[corpus.Module], count: int) -> str:
    """List chats that ask for a function, drawn from all, as JSON Lines."""
    functions = [one for module in modules for one in corpus.functions(module) if len(one.head) <= LONGEST_HEAD]
    heads = {one.head: one for one in functions}
    chosen = random.Random(0).sample(sorted(heads), min(count, len(heads)))
    lines = [json.dumps({"messages": corpus.conversation(heads[head])[:1]}) for head in chosen]
    return "\n".join(lines) + "\n"


def serve_student(folder: Path, prompts: Sequence[CachedPrompt], log: Path, tokens: int = 24) -> ServedStudent:
    """Serve a student in float32 behind the gateway and compare its greedy tokens with transformers'.

    Raises:
        EndpointError: an answer does not come.
    """
    config = EngineConfig(model=str(folder), dtype="float32", enforce_eager=True, max_num_seqs=16)
    with open_service(config, log, Progress().say) as service:
        got = asyncio.run(_ask(service, prompts, tokens))
    wanted = decode_greedily(folder, prompts, tokens)
    different = sum(one != other for one, other in zip(got, wanted, strict=True))
    return ServedStudent(model=folder.name, answers=len(prompts), tokens=tokens * len(prompts), different=different)


async def _ask(service: TrainingService, prompts: Sequence[CachedPrompt], tokens: int) -> list[list[int]]:
    asked = [
        Prompt(f"{number}", prompt) if isinstance(prompt, str) else Prompt(f"{number}", "", {"messages": list(prompt)})
        for number, prompt in enumerate(prompts)
    ]
    async with open_session() as session:
        answers = await Client(session, service.base_url, service.model_name, tokens).run_round(asked)
    for answer in answers:
        if answer.error is not None:
            raise EndpointError(f"{service.base_url}: expected an answer of the student, got {answer.error}")
    return [answer.token_ids for answer in answers]


@torch.no_grad()
def decode_greedily(folder: Path, prompts: Sequence[CachedPrompt], tokens: int) -> list[list[int]]:
    """Decode with transformers in float32, without a cache of keys and values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = encode_prompt(prompt, tokenizer)
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[-tokens:])
    return answers


if __name__ == "__main__":
    sys.exit(main())
