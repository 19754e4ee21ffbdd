"""Score the atoms of a Laguna's routed experts on text, and write the artefacts of structured pruning.

Written to --out, in the published formats (L sparse layers, E experts of N atoms, G groups of B atoms):

  atomic_scores.npy                      [L, E, N] float32     importance of each atom
  group_indices_importance_sorted.npy    [L, E, G, B] int64    each expert's atoms by falling score, in groups
  group_scores_importance_sorted.npy     [L, E, G] float32     sum of a group's scores
  group_keep_mask_{10,25,40}pct.npy      [L, E, G] bool        all but the lowest groups, at least one per expert
  group_keep_mask_random_{…}pct.npy      [L, E, G] bool        the control: as many groups, drawn at random
  MANIFEST.json                          how they were made, and a SHA-256 of each

`laguna compact` makes a smaller checkpoint from a mask and the indices.  The text should be the kind of text that the
model is for, and none that the result will be judged on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laguna_serve.plugins.pruning import (
    ExpertShape,
    PruningError,
    draw_random_mask,
    rank_groups,
    read_shape,
)
from laguna_serve.serving.checkpoint import read_config, require_folder
from laguna_serve.serving.kit.cli import Parser, run_command
from laguna_serve.serving.kit.files import write_stream

SCHEMA = "laguna_serve.expert_scores/1"
RATIOS = (0.10, 0.25, 0.40)
THREADS = 1  # with two, a backward pass adds up in another order every time (seen: scores differ by 7e-7)
EXAMPLES = """examples:
  python scripts/score_experts.py tests/toy/teacher --out tests/toy/masks          the toy family's (one minute)
  python scripts/score_experts.py MODEL --text code.jsonl --block-size 64 --out DIR
  python scripts/score_experts.py MODEL --atomic-scores theirs.npy --out DIR       somebody else's scores
"""


def load_model(folder: Path, threads: int) -> tuple[Any, Any]:
    """transformers' Laguna in fp32 on the CPU, and its tokenizer."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LagunaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def measure_scores(args: argparse.Namespace, folder: Path, shape: ExpertShape) -> tuple[Any, dict[str, Any]]:
    """Atomic scores [L, E, N] measured on the text, and a description of how."""
    from laguna_serve.scripts.text.rows import read_rows
    from laguna_serve.scripts.training.pruning.scores import SCORES, score_atoms

    model, tokenizer = load_model(folder, THREADS)
    text = read_rows(args.text, tokenizer, args.length, args.tokens)
    say(f"{text.tokens} tokens of {args.text} in {len(text.rows)} rows")
    scores = score_atoms(model, shape, text.rows, SCORES[args.score], say)
    how = {"score": args.score, "text": text.source, "documents": text.documents}
    return scores, {**how, "rows": len(text.rows), "tokens": text.tokens}


def read_scores(path: Path, shape: ExpertShape) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Somebody else's atomic scores, checked."""
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PruningError(f"{path}: expected a NumPy file (.npy), got one that cannot be read ({error})") from None
    expected = (len(shape.layers), shape.num_experts, shape.intermediate_size)
    if not isinstance(scores, np.ndarray) or scores.shape != expected or scores.dtype.kind != "f":
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, np.ndarray) else "an archive"
        raise PruningError(f"{path}: expected float scores {list(expected)}, got {got}; are they for this model?")
    if not np.isfinite(scores).all():
        raise PruningError(f"{path}: expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not")
    return scores.astype(np.float32), {"score": str(path), "sha256": hash_file(path)}


def make_artefacts(scores: npt.NDArray[np.float32], block_size: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """File name → array, everything that is derived from the scores."""
    from laguna_serve.scripts.training.pruning.scores import group_atoms

    indices, group_scores = group_atoms(scores, block_size)
    L, E, N = scores.shape
    shape = ExpertShape(tuple(range(L)), E, N, 0)
    files: dict[str, npt.NDArray[Any]] = {
        "atomic_scores": scores,
        "group_indices_importance_sorted": indices,
        "group_scores_importance_sorted": group_scores,
    }
    for ratio in RATIOS:
        files[f"group_keep_mask_{ratio * 100:.0f}pct"] = rank_groups(group_scores, ratio)
        files[f"group_keep_mask_random_{ratio * 100:.0f}pct"] = draw_random_mask(shape, N // block_size, ratio, seed)
    return files


def write_artefacts(out: Path, files: dict[str, npt.NDArray[Any]], made: dict[str, Any]) -> dict[str, Any]:
    """Write the arrays, then the manifest; returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, array in files.items():
        path = out / f"{name}.npy"
        write_stream(path, lambda file, array=array: np.save(file, array))  # type: ignore[misc]
        digests[path.name] = hash_file(path)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    manifest = {"schema": SCHEMA, **made, "python": platform.python_version(), "versions": versions, "sha256": digests}
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def choose_block_size(given: int | None, shape: ExpertShape) -> int:
    """The given width of a group, by default an eighth of an expert."""
    size = given if given is not None else max(1, shape.intermediate_size // 8)
    if size < 1 or shape.intermediate_size % size:
        expected = f"a divisor of the experts' width {shape.intermediate_size}"
        raise PruningError(f"--block-size: expected {expected}, got {size}; an eighth of the width is usual")
    return size


def say(text: str) -> None:
    print(f"score_experts: {text}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("teacher", help="Laguna checkpoint: a folder, or a hub id that is in the local cache")
    parser.add_argument("--out", type=Path, required=True, help="folder for the artefacts")
    text = "calibration text: .txt, .jsonl with text or prompt, or toy:training (default)"
    parser.add_argument("--text", "--prompts", default="toy:training", help=text)
    parser.add_argument(
        "--tokens", type=int, default=98_304, help="about how many tokens to read (default %(default)s)"
    )
    parser.add_argument("--length", type=int, default=384, help="tokens in a row at most (default %(default)s)")
    parser.add_argument("--score", choices=("loss", "output"), default="loss", help="see training/pruning/scores.py")
    parser.add_argument("--atomic-scores", type=Path, help="take these scores [L, E, N] and read no text")
    parser.add_argument("--block-size", type=int, help="atoms in a group (default: an eighth of an expert)")
    parser.add_argument("--seed", type=int, default=0, help="of the random controls (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    folder = require_folder(args.teacher)
    shape = read_shape(read_config(folder), args.teacher)
    block_size = choose_block_size(args.block_size, shape)
    if args.atomic_scores is not None:
        scores, how = read_scores(args.atomic_scores, shape)
    else:
        scores, how = measure_scores(args, folder, shape)
    made = {"model": args.teacher, **how, "block_size": block_size, "seed": args.seed}
    manifest = write_artefacts(args.out, make_artefacts(scores, block_size, args.seed), made)
    print(json.dumps({"out": str(args.out), **manifest}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("score_experts", main, others=(PruningError,), interrupted="nothing was written"))
