"""What has been learnt about a model's decodes, as a folder, and the proposers that it gives."""

from __future__ import annotations

from pathlib import Path

from laguna_serve.plugins.diffusion.decoding.reference import Reference
from laguna_serve.plugins.diffusion.low_precision import count_stored_bytes
from laguna_serve.plugins.diffusion.model import Llada
from laguna_serve.plugins.diffusion.predictor import Predictor
from laguna_serve.plugins.diffusion.proposing.graph import Graph
from laguna_serve.plugins.diffusion.proposing.interface import Proposer
from laguna_serve.plugins.diffusion.proposing.order import Ordered, OrderModel
from laguna_serve.plugins.diffusion.proposing.shapes import Chain, Sequential, Spread, Union
from laguna_serve.plugins.diffusion.proposing.sources import Corrected, Drafted, Stale

ORDER = "order.safetensors"
# Whose logits a graph's ranks are by → its file.
GRAPHS = {"target": "graph.json", "draft": "graph-draft.json", "corrected": "graph-corrected.json"}


def count_read(model: Llada) -> int:
    """Count the bytes of parameters that a pass reads: all but an embedding that is no head, of which it takes rows."""
    rows_alone = 0 if model.config.weight_tying else model.embedding.weight.nbytes
    return sum(map(count_stored_bytes, model.parameters())) - rows_alone


def find_cost(target: Llada, draft: Llada) -> float:
    """Estimate what a pass of the draft costs in passes of the target, by the bytes that each reads."""
    return count_read(draft) / count_read(target)


def load_proposers(folder: Path, target: Llada, draft: Llada | None, reference: Reference) -> dict[str, Proposer]:
    """Load what `scripts/training/diffusion/calibrate.py` wrote, as proposers by name.

    Raises:
        DiffusionError: a file is missing, damaged, or of another target.
    """
    stale = Stale()
    graph = Spread(stale, Graph.load(folder / GRAPHS["target"]))
    order = Ordered(OrderModel.load(folder / ORDER, target.embedding.weight))
    proposers: dict[str, Proposer] = {
        "chain": Chain(stale),
        "graph": graph,
        "order": order,
        "union": Union(order, graph),
    }
    if draft is not None:
        drafted = Drafted(Predictor(draft, reference.cache, reference.guidance))
        of_draft = Spread(drafted, Graph.load(folder / GRAPHS["draft"]))
        corrected = Spread(Corrected(drafted), Graph.load(folder / GRAPHS["corrected"]))
        proposers |= {
            "draft": of_draft,
            "draft, gated": Sequential(drafted, find_cost(target, draft)),
            "draft, corrected": corrected,
            "order and draft": Union(order, of_draft),
            "order and corrected": Union(order, corrected),
        }
    return proposers
