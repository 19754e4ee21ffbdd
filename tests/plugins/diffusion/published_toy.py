"""The toy LLaDA in crowds of unlike requests against the published loop written out: print, as JSON, what differs.

    python tests/plugins/diffusion/published_toy.py GUIDANCE PROMPTS

Prompts are cut to their last eight tokens; each is decoded in blocks of 8, 32 and 64, in as many steps as its canvas of
64 has tokens and in half of them, float32.  With 256 prompts it takes half an hour on a core, with guidance an hour.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path

import published
import torch
from transformers import PreTrainedTokenizerFast

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Evenly, Reference
from laguna_serve.plugins.diffusion.model import load_model
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.interface import Run
from laguna_serve.plugins.diffusion.speculation import Decoder

TOY = Path(__file__).resolve().parents[2] / "toy"
LENGTH, CROWD = 64, 16


def main(guidance: float, prompts: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(TOY / "llada"), PreTrainedTokenizerFast.from_pretrained(TOY / "llada")
    mask = model.config.mask_token_id
    texts = [json.loads(line)["prompt"] for line in (TOY / "prompts.jsonl").read_text().splitlines()[:prompts]]
    ids = [tokenizer(text)["input_ids"][-8:] for text in texts]
    waiting = list(product(ids, (8, 32, 64), (LENGTH, LENGTH // 2)))
    random.Random(0).shuffle(waiting)
    decoder = Decoder(Predictor(model, "none", guidance), Reference(guidance=guidance))
    rng, going, done, differing = random.Random(1), {}, 0, []
    while waiting or going:
        while waiting and len(going) < CROWD and (len(going) < CROWD // 2 or rng.random() < 0.5):
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
    print(json.dumps({"answers": done, "differing": differing}))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
