"""Does a certificate apply here? Its identity against this machine, this installation and these weights, in seconds.

Prints a line for each part that differs, with what the certificate was made with and what is here. What was certified
(dtype, γ, compiled or eager) is taken from the certificate unless a flag says what it is to be held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from laguna_serve.bench.certificate.identity import (
    NOT_HERE,
    WAITING,
    WEIGHTS,
    Identity,
    make_identity,
    read_machine,
    read_weights,
)
from laguna_serve.bench.certificate.result import Certificate
from laguna_serve.bench.certificate.subject import BASELINE_ROLE, CANDIDATE_ROLE, COMPILE, DRAFT_ROLE, DTYPE, GAMMA
from laguna_serve.serving.checkpoint import CheckpointError
from laguna_serve.serving.kit.cli import COULD_NOT_RUN, FELL_SHORT, HELD
from laguna_serve.serving.kit.environment import Environment
from laguna_serve.serving.kit.flags import BoundedConfig, Flag
from laguna_serve.serving.kit.results import read_result

EXAMPLES = """
examples:
  python bench/certify.py --check bench/results/toy-gamma-adaptive/certificate.json
  python bench/certify.py --check certificate.json --model poolside/Laguna-XS.2 --draft path/to/drafter

exit status:
  0  it applies here
  1  it does not: every part that differs is named
  2  not known: the certificate carries no identity, or weights are not on this machine
"""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(BoundedConfig):
    """A certificate, and where this machine has what it is of."""

    check: Annotated[Path, Flag("the certificate (certificate.json, or its folder)", metavar="FILE")]
    model: Annotated[str | None, Flag("the target here (default: where it was)", metavar="M")] = None
    candidate_model: Annotated[str | None, Flag("the candidate's, where it is another", metavar="M")] = None
    draft: Annotated[str | None, Flag("the drafter here (default: where it was)", metavar="D")] = None
    dtype: Annotated[str | None, Flag("hold it against this dtype")] = None
    gamma: Annotated[int | None, Flag("hold it against this γ", metavar="N", at_least=1)] = None
    eager: Annotated[bool, Flag("hold it against engines without compilation")] = False


class DifferentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the identity that is otherwise here; None: there is no such part."""

    part: str
    expected: str | None
    got: str | None


class CertificateCheck(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.certificate_check/1"
):
    """Whether a certificate applies here.

    Attributes:
        applies: None where that is not known.
        verdict: the certificate's.
        expected, got: SHA-256 of the certificate's identity and of the one here; None without one.
        unknown: why it is not known, a line each.
    """

    applies: bool | None
    verdict: str
    expected: str | None
    got: str | None
    differing: list[DifferentPart]
    unknown: list[str]

    @property
    def status(self) -> int:
        """The command's exit status."""
        return COULD_NOT_RUN if self.applies is None else HELD if self.applies else FELL_SHORT


def check_certificate(config: CheckConfig, environment: Environment) -> CertificateCheck:
    """Hold the certificate's identity against this machine.

    Raises:
        ResultError: the file is no certificate.
        EngineError, IdentityError: this machine has no vLLM, no device for it, or a torch that does not answer.
    """
    path = config.check / "certificate.json" if config.check.is_dir() else config.check
    certificate = read_result(path, Certificate)
    identity = certificate.identity
    if identity is None:
        made = certificate.environment
        why = f"{path} carries no identity (made on {made.date[:10]}, by URL or before there were any)"
        why = f"{why}; certify again here: {made.command}"
        return CertificateCheck(
            applies=None, verdict=certificate.verdict, expected=None, got=None, differing=[], unknown=[why]
        )
    given = {BASELINE_ROLE: config.model, CANDIDATE_ROLE: config.candidate_model, DRAFT_ROLE: config.draft}
    models = identity.models | {role: name for role, name in given.items() if name is not None}
    subject = {part: value for part, value in identity.parts.items() if part in (DTYPE, GAMMA, COMPILE)}
    settings = {DTYPE: config.dtype, GAMMA: config.gamma, COMPILE: "eager" if config.eager else None}
    subject |= {part: str(value) for part, value in settings.items() if value is not None}
    kept = {part: value for part, value in identity.parts.items() if part.startswith("setting, ")}
    machine = read_machine(environment, models.get(BASELINE_ROLE))
    here = make_identity(kept | subject | machine | _find_weights(models), models)
    return compare(certificate.verdict, identity, here)


def _find_weights(models: Mapping[str, str]) -> dict[str, str]:
    """Find weights as `read_weights` does; folders that are gone count as weights that are not here."""
    weights: dict[str, str] = {}
    for role, name in models.items():
        try:
            weights |= read_weights({role: name})
        except CheckpointError:
            weights[WEIGHTS + role] = NOT_HERE
    return weights


def compare(verdict: str, expected: Identity, got: Identity) -> CertificateCheck:
    """Part by part. Weights that are not here, or were read in another way, are not known to differ."""
    differing, unknown = list[DifferentPart](), list[str]()
    for part in sorted({*expected.parts, *got.parts}.difference(f"${name}" for name in WAITING)):
        before, now = expected.parts.get(part), got.parts.get(part)
        if before == now and before != NOT_HERE:
            continue
        if NOT_HERE in (before, now):
            unknown.append(f"{part}: expected {before}, got {now}; name its folder with --model or --draft")
        elif part.startswith(WEIGHTS) and before is not None and now is not None and _kind(before) != _kind(now):
            unknown.append(f"{part}: expected {before}, got {now}, which was read in another way")
        else:
            differing.append(DifferentPart(part=part, expected=before, got=now))
    return CertificateCheck(
        applies=False if differing else None if unknown else True,
        verdict=verdict,
        expected=expected.sha256,
        got=got.sha256,
        differing=differing,
        unknown=unknown,
    )


def _kind(digest: str) -> str:
    """How weights were read: whole or sampled."""
    return digest.partition(":")[0]


def render_check(check: CertificateCheck) -> str:
    """One line for each part that differs, after the answer."""
    if check.applies:
        return f"applies here: {check.verdict} (identity {check.expected})"
    lines = [f"does not apply here: {len(check.differing)} parts of its identity differ"]
    if check.applies is None:
        lines = ["not known whether it applies here"]
    lines += [
        f"- {item.part}: expected {item.expected or 'none'}, got {item.got or 'none'}" for item in check.differing
    ]
    return "\n".join([*lines, *(f"- {line}" for line in check.unknown)])
