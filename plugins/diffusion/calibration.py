"""What is counted on other prompts: which sets of ranks a decode comes by, and how often a draft knows what is next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import Reference, rank, step
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.predictor import Ask, Predictor, Slot
from laguna_serve.plugins.diffusion.proposing.graph import Graph, Node, choose_nodes, trace_path
from laguna_serve.plugins.diffusion.proposing.sources import Source
from laguna_serve.plugins.diffusion.speculation import Decoder


def name_prompt(ids: Sequence[int]) -> str:
    """Name a prompt by its tokens, so that it is known again in any file."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def calibrate(decoder: Decoder, source: Source, canvases: Iterable[Canvas], most: int) -> Graph:
    """Decode canvases step by step, rank each state's open positions by the source, and choose up to `most` nodes.

    Args:
        decoder: of the reference, without speculation.
    """
    assert decoder.speculation is None, "every state of the reference has to be seen"
    paths: list[list[Node]] = []
    for canvas in canvases:
        run = decoder.begin(canvas)
        states, rankings = [run.state], {}
        while run.find_end() is None:
            logits = None if decoder.predictor.opens(canvas, run.state) else source.estimate([run])[0]
            if logits is not None:
                rankings[run.steps] = rank(canvas, decoder.reference, run.state, logits)
            decoder.advance([run])
            states.append(run.state)
        paths += [trace_path(states[at], ranking, states[at + 1 :]) for at, ranking in rankings.items()]
    return choose_nodes(paths, most)


def measure_next_commits(
    teacher: Llada, student: Llada, canvases: Iterable[Canvas], reference: Reference
) -> tuple[float, float]:
    """Measure in what share of the target's steps the student would commit at the same position, and the same state.

    Along the target's own decode of the canvases, one token a step.
    """
    places = states = steps = 0
    for canvas in canvases:
        decoder = Decoder(Predictor(teacher), reference)
        drafting, slot = Predictor(student, reference.cache, reference.guidance), Slot()
        run = decoder.begin(canvas)
        while run.find_end() is None:
            before = run.state
            logits = drafting.predict([Ask(canvas, slot, [before])])[0][before]
            guessed = step(canvas, reference, before, logits)
            decoder.advance([run])
            mask = canvas.mask_id
            places += [t == mask for t in guessed] == [t == mask for t in run.state]
            states += guessed == run.state
            steps += 1
    return places / steps, states / steps
