"""Counting a graph of proposals on other prompts: which sets of ranks the reference comes by after each state."""

from __future__ import annotations

from collections.abc import Sequence

from laguna_serve.plugins.diffusion.decoding.canvas import Canvas
from laguna_serve.plugins.diffusion.decoding.reference import rank
from laguna_serve.plugins.diffusion.proposing.graph import Graph, Node, choose_nodes, trace_path
from laguna_serve.plugins.diffusion.proposing.sources import Source
from laguna_serve.plugins.diffusion.speculation import Decoder


def calibrate(decoder: Decoder, source: Source, canvases: Sequence[Canvas], most: int) -> Graph:
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
        paths += [trace_path(canvas, states[at], ranking, states[at + 1 :]) for at, ranking in rankings.items()]
    return choose_nodes(paths, most)
