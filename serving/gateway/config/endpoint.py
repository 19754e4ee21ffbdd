"""How an engine is reached: its URL, the credential that it asks for, and whom to trust for its certificate.

Everything that may be wrong with them is found when the configuration is validated, and read once then.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

MAX_KEY_BYTES = 64 << 10
# RFC 6750: what a bearer token may be made of; vLLM takes any visible character.
TOKEN = re.compile(r"[\x21-\x7e]+")
PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")


def check_url(url: str) -> str:
    """Check an engine's root, without a slash at the end; what is asked for under it is the request's to say.

    Raises:
        ValueError: it is none; without the URL itself, in which there may be a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("expected http://host:port[/prefix] with a port of 1 to 65535") from None
    path = parts.path.rstrip("/")
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise ValueError("expected http://host:port[/prefix]")
    if not _is_host(parts.hostname):
        raise ValueError("expected http://host:port[/prefix] with the name of a host, of labels of 1 to 63 characters")
    if "@" in url or parts.query or parts.fragment:
        raise ValueError("expected http://host:port[/prefix] without user, password or query (api_key_file has a key)")
    if port == 0:
        raise ValueError("expected http://host:port[/prefix] with a port of 1 to 65535")
    if path.endswith("/v1"):
        raise ValueError("expected http://host:port[/prefix] without /v1, with which requests begin")
    if not PREFIX.fullmatch(path):
        raise ValueError("expected http://host:port[/prefix] with a prefix of plain words")
    return url.rstrip("/")


def _is_host(name: str) -> bool:
    """Say whether it can be looked up: of a label that is none every connection would be an error of the gateway's."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def read_credential(file: str | None, variable: str | None) -> str | None:
    """Read the API key of an engine, from a file or from the environment.

    Raises ValueError, without any of its text.
    """
    if file is not None and variable is not None:
        raise ValueError("expected api_key_file or api_key_env, got both")
    if file is not None:
        name, text = "api_key_file", read_file(file, "api_key_file", MAX_KEY_BYTES).strip()
    elif variable is not None:
        name, text = "api_key_env", os.environ.get(variable, "").strip()
        if not text:
            raise ValueError("api_key_env: expected the name of an environment variable that is set, got another one")
    else:
        return None
    if not TOKEN.fullmatch(text):
        got = "several words or other characters" if text else "nothing"
        raise ValueError(f"{name}: expected one word of visible ASCII characters, got {got}")
    return text


def read_file(path: str, what: str, most: int, remedy: str = "") -> str:
    """Read the text of a regular file: what else could be opened might block.

    Raises ValueError, without path or text; its end is `remedy` where the file cannot be opened.
    """
    if "\0" in path:
        raise ValueError(f"{what}: expected the name of a file, got one with a character that no name has")
    try:
        if not Path(path).is_file():
            Path(path).stat()
            raise ValueError(f"{what}: expected a file, got something else")
        if (size := Path(path).stat().st_size) > most:
            raise ValueError(f"{what}: expected at most {most} bytes, got {size}")
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{what}: expected a file that can be read, got {error.strerror or error}{remedy}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what}: expected text, got other bytes") from None


# Of one reading of a configuration, by the file of authorities and whether certificates are checked.
Contexts = MutableMapping[tuple[str | None, bool], ssl.SSLContext]


def share_client_context(ca_file: str | None, verify: bool, made: Contexts) -> ssl.SSLContext:
    """As `make_client_context`, once for all engines that trust the same: each takes 20 ms and half a megabyte."""
    if (context := made.get((ca_file, verify))) is None:
        context = made[ca_file, verify] = make_client_context(ca_file, verify=verify)
    return context


def make_client_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    """For connections to an engine over https. Raises ValueError: the file has no certificates."""
    context = ssl.create_default_context()
    if ca_file is not None:
        read_file(ca_file, "tls_ca_file", 64 << 20)
        try:
            # Instead of the system's: an engine's own authority is the only one that may vouch for it.
            context = ssl.create_default_context(cafile=ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"tls_ca_file: expected certificates in PEM, got {_explain(error)}") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def check_certificate(certfile: str | None, keyfile: str | None) -> None:
    """Check that the gateway's own certificate and its key fit together. Raises ValueError."""
    if certfile is None:
        if keyfile is not None:
            raise ValueError("expected ssl_certfile beside ssl_keyfile, got none")
        return
    for path, what in ((certfile, "ssl_certfile"), (keyfile, "ssl_keyfile")):
        if path is not None:
            read_file(path, what, 1 << 20)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: "")  # or OpenSSL would ask the terminal for it
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"expected a certificate and its private key in PEM, unencrypted, got {_explain(error)}"
        ) from None


def _explain(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason.replace("_", " ").lower() if error.reason else "none"
    return error.strerror or type(error).__name__
