"""The flags that say what two arms are: engines to start here, or endpoints that already run."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from laguna_serve.bench.harness.arms import ArmSpec
from laguna_serve.bench.harness.schedule import BASELINE, CANDIDATE
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.serve import parse_gamma

# What of them decides how an arm answers; the first three name checkpoints.
ENGINE_FLAGS = (
    "model",
    "candidate_model",
    "draft",
    "gamma",
    "baseline_args",
    "candidate_args",
    "dtype",
    "eager",
    "exact",
)


def add_arm_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, in two groups."""
    engines = parser.add_argument_group("engines to start here")
    engines.add_argument(
        "--model", metavar="M", help="target checkpoint, folder or hub id (with URLs: the served name)"
    )
    engines.add_argument(
        "--candidate-model", metavar="M", help="the candidate's checkpoint, where it is another (pruned, unpadded)"
    )
    engines.add_argument("--draft", metavar="D", help="DFlash drafter checkpoint: the candidate's only difference")
    gamma = "tokens drafted per step, N or max (default: the drafter's most)"
    engines.add_argument("--gamma", metavar="N", type=parse_gamma, help=gamma)
    engines.add_argument(
        "--baseline-args", metavar="…", default="", help="extra vLLM flags for the baseline, after an ="
    )
    engines.add_argument(
        "--candidate-args", metavar="…", default="", help="extra vLLM flags for the candidate, after an ="
    )
    engines.add_argument("--dtype", default="auto", help="vLLM's --dtype for both (default: the checkpoint's)")
    engines.add_argument("--eager", action="store_true", help="no compilation, no graphs: starts fast, runs slowly")
    exact = "serve with --exact, checked at the start: the candidate alone, to see its cost, or both"
    engines.add_argument("--exact", choices=("candidate", "both"), help=exact)
    engines.add_argument("--prefix-caching", action="store_true", help="turn prefix caching on (default: off)")
    engines.add_argument(
        "--kv-cache-gib", metavar="G", type=float, help="KV cache per engine (default: by free memory)"
    )
    urls = parser.add_argument_group("or endpoints that already run")
    urls.add_argument("--baseline-url", metavar="U", help="for example http://127.0.0.1:8000")
    urls.add_argument("--candidate-url", metavar="U")


def check_arm_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing; argparse exits with status 2."""
    by_url = args.baseline_url is not None
    if by_url != (args.candidate_url is not None):
        parser.error("--baseline-url and --candidate-url: expected both or neither, got one")
    for_engines = (args.draft, args.gamma, args.candidate_model, args.baseline_args, args.candidate_args, args.exact)
    if by_url and any(for_engines):
        parser.error(
            "--draft, --gamma, --candidate-model, --exact and extra args: expected none with URLs, as those servers "
            "already run; drop them"
        )
    if not by_url and args.model is None:
        parser.error("--model: expected a checkpoint, or two URLs, got neither")
    if args.gamma is not None and args.draft is None:
        parser.error("--gamma: expected --draft beside it, got none")
    for name in ("baseline_args", "candidate_args"):
        try:
            shlex.split(getattr(args, name))
        except ValueError as error:
            parser.error(f"--{name.replace('_', '-')}: expected flags as in a shell, got {str(error).lower()}")


def make_spec(args: argparse.Namespace, name: str) -> ArmSpec:
    """One arm from the command line. The baseline is the candidate without what --candidate-… and --draft give it."""
    url = args.baseline_url if name == BASELINE else args.candidate_url
    if url is not None:
        return ArmSpec(name, f"running at {url}", url=url, model_name=args.model)
    extra = tuple(shlex.split(args.baseline_args if name == BASELINE else args.candidate_args))
    drafting = name == CANDIDATE and args.draft is not None
    model = args.candidate_model or args.model if name == CANDIDATE else args.model
    config = EngineConfig(
        model=model,
        draft=args.draft if drafting else None,
        gamma=args.gamma if drafting else None,
        dtype=args.dtype,
        enforce_eager=args.eager,
        prefix_caching=args.prefix_caching,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
        exact=args.exact == "both" or (args.exact == "candidate" and name == CANDIDATE),
        extra_args=extra,
    )
    gamma = "its trained maximum" if args.gamma is None else str(args.gamma)
    parts = [model, f"drafter {args.draft}, γ {gamma}" if drafting else "no drafter"]
    parts += ["eager"] if args.eager else []
    parts += ["exact"] if config.exact else []
    parts += [shlex.join(extra)] if extra else []
    return ArmSpec(name, "; ".join(parts), config=config)


def find_dtype(args: argparse.Namespace) -> str:
    """The models' dtype: as asked, else as the checkpoint says, else unknown (judged as strictly as float32)."""
    if args.dtype != "auto":
        return {"half": "float16", "float": "float32"}.get(args.dtype, str(args.dtype))
    try:
        config = json.loads((Path(args.model or "") / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(config.get("dtype") or config.get("torch_dtype") or "unknown")


def parse_numbers(text: str) -> list[int]:
    """Positive integers separated by commas, each once, rising."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive numbers like 1,3,7, got {text!r}")
    return sorted({int(part) for part in parts})
