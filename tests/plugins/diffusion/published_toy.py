"""The toy LLaDA against the published loop written out: print, as JSON, the answers that differ.

    python tests/plugins/diffusion/published_toy.py --guidance 1 --prompts 256
    python tests/plugins/diffusion/published_toy.py --crowd 1
    python tests/plugins/diffusion/published_toy.py --backend vllm

Prompts are cut to their last eight tokens; each is decoded in blocks of 8, 32 and 64, in as many steps as its canvas of
64 has tokens and in half of them, float32, among as many other unlike requests as the crowd has. 256 prompts take a
quarter to half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import published
import torch
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Evenly, Reference
from laguna_serve.plugins.diffusion.model import load_model
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.interface import Run
from laguna_serve.plugins.diffusion.speculation import Decoder
from laguna_serve.plugins.diffusion.vllm_model import VllmModel

TOY = Path(__file__).resolve().parents[2] / "toy"
LENGTH = 64


@contextmanager
def open_backend(name: str) -> Iterator[Any]:
    """The model that requests are decoded with: this project's pass, or vLLM's."""
    if name == "own":
        yield load_model(TOY / "llada")
    else:
        with VllmModel(TOY / "llada", kv_cache_memory_bytes=64 << 20) as model:
            yield model


def compare(guidance: float, prompts: int, crowd: int, backend: str) -> dict[str, object]:
    torch.set_num_threads(1)
    model, tokenizer = load_model(TOY / "llada"), PreTrainedTokenizerFast.from_pretrained(TOY / "llada")
    mask = model.config.mask_token_id
    texts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:prompts]]
    ids = [tokenizer(text)["input_ids"][-8:] for text in texts]
    waiting = list(product(ids, (8, 32, 64), (LENGTH, LENGTH // 2)))
    random.Random(0).shuffle(waiting)
    total, rng, done, differing = len(waiting), random.Random(1), 0, []
    going: dict[Run, int] = {}
    with open_backend(backend) as decoded_with:
        decoder = Decoder(Predictor(decoded_with, "none", guidance), Reference(guidance=guidance))
        while waiting or going:
            while waiting and len(going) < crowd and (len(going) < (crowd + 1) // 2 or rng.random() < 0.5):
                prompt, block, steps = waiting.pop()
                reference = Reference(Evenly(steps * block // LENGTH), guidance=guidance)
                run = Run.begin(Canvas(tuple(prompt), LENGTH, block, mask), reference)
                going[run] = steps
            decoder.advance(list(going))
            for run in [run for run in going if run.find_end() is not None]:
                expected = published.generate(
                    lambda rows: model(rows),
                    list(run.canvas.prompt),
                    steps=going.pop(run),
                    gen_length=LENGTH,
                    block_length=run.canvas.block_length,
                    mask_id=mask,
                    cfg_scale=guidance,
                )
                done += 1
                if list(run.state) != expected:
                    differing.append([run.canvas.prompt, run.canvas.block_length])
                if done % 64 == 0:
                    print(f"{done} of {total} answers, {len(differing)} differ", file=sys.stderr, flush=True)
    given = {"guidance": guidance, "prompts": prompts, "crowd": crowd, "backend": backend}
    return {**given, "answers": done, "differing": differing}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance (default 0)")
    parser.add_argument("--prompts", type=int, default=256, help="of the toy's (default 256)")
    parser.add_argument("--crowd", type=int, default=16, help="requests at once at most (default 16)")
    parser.add_argument("--backend", choices=("own", "vllm"), default="own", help="whose pass decodes (default own)")
    print(json.dumps(compare(**vars(parser.parse_args()))))
