"""The engines' own metrics, read and shown under the gateway's address: every sample with its upstream as a label.

Works on the text format (https://prometheus.io/docs/instrumenting/exposition_formats/) line by line; parsing vLLM's
thousands of samples into objects would hold up the streams.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import aiohttp

from laguna_serve.serving.gateway.config.tables import Endpoint

SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+.*)$")
LENGTH, LENGTH_TEXT = "laguna_gateway_acceptance_length", "Tokens per speculative step since the engine started."
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
TOKENS = "vllm:generation_tokens_total"
TIMEOUT_S = 2.0


async def read_metrics(session: aiohttp.ClientSession, endpoint: Endpoint) -> str:
    """Read the text that an engine shows, or nothing."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with session.get(f"{endpoint.url}/metrics", timeout=timeout, **endpoint.request_options()) as response:
            return await response.text("utf-8", "replace") if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError):
        return ""


def split_lines(text: str) -> list[str]:
    """Split at the ends of lines alone: U+2028 and the like, at which `splitlines` splits too, may stand in a label."""
    return re.split(r"\r?\n", text)


def merge(texts: Mapping[tuple[str, str], str]) -> str:
    """One exposition out of the engines' (by model and upstream), with their acceptance lengths as a gauge.

    A family's samples stay together, as the format asks.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    lengths: list[str] = []
    for (model, upstream), text in texts.items():
        family = ""
        sums = dict.fromkeys((DRAFTS, ACCEPTED), 0.0)
        for line in split_lines(text):
            if line.startswith("# "):
                kind, _, rest = line[2:].partition(" ")
                family = rest.partition(" ")[0]
                known = headers.setdefault(family, [])
                if not any(other.startswith(f"# {kind} ") for other in known):
                    known.append(line)
            elif (match := SAMPLE.match(line)) is not None:
                name, labels, value = match.groups()
                if name in sums:
                    sums[name] += float(value.split()[0])
                label = f'upstream="{upstream}"'
                samples.setdefault(family, []).append(f"{name}{{{label}{',' + labels if labels else ''}}} {value}")
        if sums[DRAFTS]:
            length = 1 + sums[ACCEPTED] / sums[DRAFTS]
            lengths.append(f'{LENGTH}{{model="{_escape(model)}",upstream="{upstream}"}} {length}')
    lines = [line for family, found in samples.items() for line in (*headers.get(family, ()), *found)]
    if lengths:
        lines += [f"# HELP {LENGTH} {LENGTH_TEXT}", f"# TYPE {LENGTH} gauge", *lengths]
    return "\n".join(lines) + "\n" if lines else ""


def sum_samples(text: str, names: Collection[str]) -> dict[str, float]:
    """Of each of these metrics, the sum over its labels."""
    sums = dict.fromkeys(names, 0.0)
    for line in split_lines(text):
        if line.startswith(tuple(names)) and (match := SAMPLE.match(line)) is not None and match[1] in sums:
            sums[match[1]] += float(match[3].split()[0])
    return sums


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')
