"""How much each atom of each routed expert matters: five scores of the same sums over text.

An atom is one gate row, one up row and one down column d. For a token that the router sends to the expert, with
routing weight w (the routed scale included), a = silu(gate · x) · (up · x) is the atom's strength, and the atom adds

    δ = w · a · d

to the layer's output. g is the gradient of the row's summed loss with regard to the layer's output at that token, so
that w · g is the gradient at the expert's own output. n: tokens routed to the expert. T: *all* tokens predicted.

| score | of an atom | units |
|--|--|--|
| `loss` | Σ ½ (g · δ)² ÷ T | nats: what removing it adds to the mean loss, to second order, the gradients' covariance in place of the Hessian (empirical Fisher) |
| `heapr` | (Σ a² ÷ n) · dᵀ M d, M = Σ (w g)(w g)ᵀ ÷ n | HEAPr's (arXiv:2509.22299), of the summed loss: a constant factor above its mean loss |
| `output` | Σ ‖δ‖² ÷ T | squared units of the layer's output: no gradients |
| `reap` | (Σ w ‖f(x)‖ ÷ n) ÷ N, f the expert | REAP's (arXiv:2510.13999), of whole experts: shared out evenly among N atoms |
| `magnitude` | ‖gate‖² + ‖up‖² + ‖d‖² | no text |

`loss` and `output` weigh an expert by how often it is chosen. `heapr` and `reap` are means over the tokens routed to it,
so that frequency is divided out; an expert that no token was routed to scores 0. HEAPr takes the expectations of
activations and gradients apart, where `loss` has each token's own gradient meet its own activation. dᵀ M d is the mean
of (w g · d)², so that no [H, H] matrix is made. Atoms are taken one by one; that they err together is left out.

MoNE (arXiv:2507.00390) ranks whole experts by the unbiased standard deviation of what they give times how much the
router asks of them, √(Σ ‖f(x) − f̄‖² ÷ (n − 1)) · Σ w ÷ T, and puts the constant f̄ = Σ f(x) ÷ n in a pruned one's place.
That the second factor is a sum of routing weights, not of tokens, follows the authors' program.
"""  # noqa: E501  a table

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCall:
    """One expert's work on the n tokens of a row that were routed to it, in the model's dtype.

    gate_up [2N, H], down [H, N]: its weights. x [n, H]: its inputs. weights [n]: routing weights, scaled.
    grads [n, H]: gradient of the row's summed loss with regard to the layer's output; None without a backward pass.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    grads: torch.Tensor | None


@dataclass(slots=True, eq=False)
class ExpertSums:
    """Sums over the tokens routed to each of a layer's E experts, in fp64, from which every score is computed.

    Attributes:
        tokens: [E] how many there were.
        strengths: [E, N] Σ a².
        outputs: [E, N] Σ (w a)².
        pulls: [E, N] Σ (w g · d)²; zero without gradients, as are
        losses: [E, N] Σ (g · δ)².
        norms: [E] Σ w ‖f(x)‖.
        gates: [E] Σ w.
        squares: [E] Σ ‖f(x)‖².
        means: [E, H] Σ f(x): divided by the tokens, MoNE's constant (arXiv:2507.00390).
        columns: [E, N] ‖d‖², of the weights.
        weights: [E, N] ‖gate‖² + ‖up‖² + ‖d‖².
    """

    tokens: torch.Tensor
    strengths: torch.Tensor
    outputs: torch.Tensor
    pulls: torch.Tensor
    losses: torch.Tensor
    norms: torch.Tensor
    gates: torch.Tensor
    squares: torch.Tensor
    means: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of_weights(cls, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertSums:
        """Start scores of no token yet. gate_up [E, 2N, H], down [E, H, N]: the layer's weights."""
        E, H, N = down.shape

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=down.device)

        # Expert by expert: fp32 copies of a whole layer would be as large as the layer.
        columns = torch.stack([matrix.float().square().sum(0) for matrix in down]).double()
        rows = torch.stack([matrix.float().square().sum(1).view(2, N).sum(0) for matrix in gate_up]).double()
        return cls(
            tokens=zeros(E),
            strengths=zeros(E, N),
            outputs=zeros(E, N),
            pulls=zeros(E, N),
            losses=zeros(E, N),
            norms=zeros(E),
            gates=zeros(E),
            squares=zeros(E),
            means=zeros(E, H),
            columns=columns,
            weights=rows + columns,
        )

    def add(self, expert: int, call: ExpertCall) -> None:
        """Add what an expert did for the tokens of a row."""
        weights = call.weights.float()[:, None]
        gate, up = (call.x @ call.gate_up.t()).float().chunk(2, dim=-1)
        strengths = F.silu(gate) * up
        outputs = (strengths.to(call.down.dtype) @ call.down.t()).float()
        weighted = weights * strengths
        self.tokens[expert] += len(call.x)
        self.strengths[expert] += strengths.square().sum(0)
        self.outputs[expert] += weighted.square().sum(0)
        self.norms[expert] += (weights[:, 0] * outputs.norm(dim=-1)).sum()
        self.gates[expert] += weights.sum()
        self.squares[expert] += outputs.square().sum()
        self.means[expert] += outputs.sum(0)
        if call.grads is not None:
            pulls = (call.grads @ call.down).float()
            self.pulls[expert] += (weights * pulls).square().sum(0)
            self.losses[expert] += (weighted * pulls).square().sum(0)

    def to_arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        """Name → array, for a file."""
        return {name: getattr(self, name).cpu().numpy() for name in self.__slots__}

    @classmethod
    def from_arrays(cls, arrays: Any) -> ExpertSums:
        """Read what `to_arrays` gave."""
        return cls(**{name: torch.from_numpy(np.asarray(arrays[name])) for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Score:
    """A score: (sums, T) → [E, N] fp64, higher is more important; what it has to be measured with."""

    compute: Callable[[ExpertSums, int], torch.Tensor]
    needs_gradients: bool = False
    needs_text: bool = True


def loss_saliency(sums: ExpertSums, targets: int) -> torch.Tensor:
    """½ Σ (g · δ)² ÷ T: nats."""
    return 0.5 * sums.losses / targets


def heapr_saliency(sums: ExpertSums, _targets: int) -> torch.Tensor:
    """Mean of a² times dᵀ M d, both over the tokens routed to the expert."""
    return sums.strengths * sums.pulls / sums.tokens.clamp(min=1).square()[:, None]


def output_saliency(sums: ExpertSums, targets: int) -> torch.Tensor:
    """Σ ‖δ‖² ÷ T: squared units of the layer's output."""
    return sums.outputs * sums.columns / targets


def rank_reap(sums: ExpertSums) -> torch.Tensor:
    """REAP's score [E] of whole experts: mean routing weight times the norm of what they give."""
    return sums.norms / sums.tokens.clamp(min=1)


def rank_mone(sums: ExpertSums, targets: int) -> torch.Tensor:
    """MoNE's score [E] of whole experts; 0 of one that fewer than two tokens were routed to."""
    spread = sums.squares - sums.means.square().sum(1) / sums.tokens.clamp(min=1)
    return (spread.clamp(min=0) / (sums.tokens - 1).clamp(min=1)).sqrt() * sums.gates / targets


def find_constants(sums: ExpertSums) -> torch.Tensor:
    """MoNE's constants [E, H]: the mean of what each expert gave; 0 of one that no token was routed to."""
    return sums.means / sums.tokens.clamp(min=1)[:, None]


def reap_saliency(sums: ExpertSums, _targets: int) -> torch.Tensor:
    """REAP's score of the expert, an equal part of it for each atom."""
    N = sums.strengths.shape[1]
    return (rank_reap(sums) / N)[:, None].repeat(1, N)


def magnitude(sums: ExpertSums, _targets: int) -> torch.Tensor:
    """Squared norm of the atom's three vectors of weights."""
    return sums.weights


SCORES: dict[str, Score] = {
    "loss": Score(loss_saliency, needs_gradients=True),
    "heapr": Score(heapr_saliency, needs_gradients=True),
    "output": Score(output_saliency),
    "reap": Score(reap_saliency),
    "magnitude": Score(magnitude, needs_text=False),
}


def group_atoms(
    scores: npt.NDArray[np.float32], block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Sort each expert's atoms by falling score into groups: indices [L, E, G, B] int64, scores [L, E, G] fp32.

    A group's score is the sum of its atoms'. Of equal atoms the earlier one comes first.
    """
    L, E, N = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    indices = order.reshape(L, E, N // block_size, block_size).astype(np.int64)
    return indices, ranked.reshape(indices.shape).sum(axis=-1, dtype=np.float64).astype(np.float32)
