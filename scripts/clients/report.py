"""The checks as tables: a client in each row, a check in each column, and what fell short in words."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from laguna_serve.serving.kit.tables import Table

NOT_A_PART = "–"


class ClientCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What one client was found to do."""

    client: str
    version: str
    check: str
    ok: bool
    detail: str


class ClientsResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.clients/1"):
    """Which clients work with a server; `held` of the checks."""

    command: str
    date: str
    server: str
    versions: dict[str, str]
    held: int
    checks: tuple[ClientCheck, ...]
    minutes: float


def table(checks: Sequence[ClientCheck]) -> list[list[str]]:
    """Heading and rows; "yes" and "no", and a dash for what a client does not have."""
    columns = list(dict.fromkeys(check.check for check in checks))
    clients = dict.fromkeys((check.client, check.version) for check in checks)
    held = {(check.client, check.check): "yes" if check.ok else "no" for check in checks}
    rows = [
        [client, release, *(held.get((client, column), NOT_A_PART) for column in columns)]
        for client, release in clients
    ]
    return [["client", "version", *columns], *rows]


def failures(checks: Sequence[ClientCheck]) -> list[str]:
    """List a line for each check that falls short."""
    return [f"{check.client}, {check.check}: {check.detail}" for check in checks if not check.ok]


def render_text(result: ClientsResult) -> str:
    """Render a table for a terminal, then what falls short."""
    return "\n".join([_tabulate(result.checks).to_text(), "", *failures(result.checks)])


def render_markdown(result: ClientsResult) -> str:
    """Render the same as a Markdown page, with what was run."""
    versions = ", ".join(f"{name} {release}" for name, release in result.versions.items())
    lines = [
        "# Clients",
        "",
        f"`{result.command}`, {result.date[:10]}, {result.minutes} minutes; {versions}.",
        "",
        f"Server: `{result.server}`.",
        "",
        f"{result.held} of {len(result.checks)} checks hold. *Engine lost*: the connection to the engine is reset"
        " in the middle of a stream, and the client must see an error. *Tool call*: its text is forced, as the toy"
        " calls none by itself; whole and streamed are compared.",
        "",
        _tabulate(result.checks).to_markdown(),
    ]
    short = failures(result.checks)
    if short:
        lines += ["", "What falls short:", "", *(f"- {line.replace(chr(10), ' ')}" for line in short)]
    return "\n".join(lines) + "\n"


def _tabulate(checks: Sequence[ClientCheck]) -> Table:
    heads, *rows = table(checks)
    return Table("l" * len(heads), heads, rows)
