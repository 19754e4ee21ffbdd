"""The checks as tables: a client in each row, a check in each column, and what fell short in words."""

from __future__ import annotations

from typing import Any

NOT_A_PART = "–"


def table(checks: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows; "yes" and "no", and a dash for what a client does not have."""
    columns = list(dict.fromkeys(check["check"] for check in checks))
    clients = dict.fromkeys((check["client"], check["version"]) for check in checks)
    found = {(check["client"], check["check"]): "yes" if check["ok"] else "no" for check in checks}
    rows = [
        [client, release, *(found.get((client, column), NOT_A_PART) for column in columns)]
        for client, release in clients
    ]
    return [["client", "version", *columns], *rows]


def failures(checks: list[dict[str, Any]]) -> list[str]:
    """A line for each check that falls short."""
    return [f"{check['client']}, {check['check']}: {check['detail']}" for check in checks if not check["ok"]]


def render_text(result: dict[str, Any]) -> str:
    """For a terminal."""
    rows = table(result["checks"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *failures(result["checks"])])


def render_markdown(result: dict[str, Any]) -> str:
    """For the repository."""
    heading, *rows = table(result["checks"])
    versions = ", ".join(f"{name} {release}" for name, release in result["versions"].items())
    lines = [
        "# Clients",
        "",
        f"`{result['command']}`, {result['date'][:10]}, {result['minutes']} minutes; {versions}.",
        "",
        f"Server: `{result['server']}`.",
        "",
        f"{result['held']} of {len(result['checks'])} checks hold. *Engine lost*: the connection to the engine is reset"
        " in the middle of a stream, and the client must see an error. *Tool call*: its text is forced, as the toy"
        " calls none by itself; whole and streamed are compared.",
        "",
        f"| {' | '.join(heading)} |",
        f"|{'---|' * len(heading)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    short = failures(result["checks"])
    if short:
        lines += ["", "What falls short:", "", *(f"- {line.replace(chr(10), ' ')}" for line in short)]
    return "\n".join(lines) + "\n"
