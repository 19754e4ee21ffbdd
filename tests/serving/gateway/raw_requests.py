"""Raw requests, valid, odd and malformed: what the two paths through the gateway are compared by."""

from __future__ import annotations

JSON = b'{"model": "m", "prompt": "x"}'
PATH = "/v1/completions"
OFFER = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
WEBSOCKET = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n"


def ask(method: str, target: str, headers: str = "", body: bytes = b"", version: str = "1.1") -> bytes:
    """A request as it is written, with a Host and nothing else of its own."""
    return f"{method} {target} HTTP/{version}\r\nhost: x\r\n{headers}\r\n".encode("latin-1") + body


def post(headers: str = "", body: bytes = JSON, target: str = PATH, version: str = "1.1") -> bytes:
    """A body with its length."""
    return ask("POST", target, f"content-length: {len(body)}\r\n{headers}", body, version)


def chunked(body: bytes, headers: str = "", version: str = "1.1") -> bytes:
    """A body that is framed already."""
    return ask("POST", PATH, f"transfer-encoding: chunked\r\n{headers}", body, version)


WHOLE = b"%x\r\n%s\r\n0\r\n\r\n" % (len(JSON), JSON)
PLAIN = {
    "get": ask("GET", "/v1/x"),
    "get-query": ask("GET", "/v1/x?a=%2F&b=1&c"),
    "get-with-a-body": ask("GET", "/v1/x", "content-length: 3\r\n", b"abc"),
    "post": post(),
    "post-empty": post(body=b""),
    "post-without-a-length": ask("POST", PATH),
    "put": ask("PUT", "/v1/x", "content-length: 2\r\n", b"{}"),
    "patch": ask("PATCH", "/v1/x", "content-length: 2\r\n", b"{}"),
    "delete": ask("DELETE", "/v1/x"),
    "delete-with-a-body": ask("DELETE", "/v1/x", "content-length: 2\r\n", b"{}"),
    "options": ask("OPTIONS", "/v1/x", "origin: http://page\r\n"),
    "head": ask("HEAD", "/v1/x"),
    "head-health": ask("HEAD", "/health"),
    "health": ask("GET", "/health"),
    "ready": ask("GET", "/ready"),
    "model-by-its-name": ask("GET", "/v1/models/m"),
    "model-that-is-none": ask("GET", "/v1/models/org%2Fname"),
    "unknown-path": ask("GET", "/nope"),
    "unknown-path-with-a-body": post(target="/nope"),
    "steering-path": post(target="/v1/load_lora_adapter"),
    "no-json": post(body=b"\xff{"),
    "deep-json": post(body=b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
}
ANSWERS = {
    "stream": post(target="/v1/stream"),
    "stream-close": post("connection: close\r\n", target="/v1/stream"),
    "stream-http-1.0": post(target="/v1/stream", version="1.0"),
    "stream-head": ask("HEAD", "/v1/stream"),
    "no-content": ask("GET", "/v1/nothing"),
    "redirect": ask("GET", "/v1/redirect"),
    "answer-that-names-a-hop": ask("GET", "/v1/hop"),
}
CONNECTION = {
    "close": post("connection: close\r\n"),
    "close-in-capitals": post("Connection: CLOSE\r\n"),
    "close-among-others": post("connection: close, x-mine\r\nx-mine: 1\r\n"),
    "keep-alive": post("connection: keep-alive\r\nkeep-alive: timeout=5\r\n"),
    "headers-of-the-connection": post("connection: x-mine\r\nconnection: x-other\r\nx-mine: 1\r\nx-other: 2\r\n"),
    "proxy-connection": post("proxy-connection: keep-alive\r\nproxy-authorization: Basic eA==\r\n"),
    "te-trailers": post("te: trailers\r\nconnection: te\r\n"),
    "http-1.0": post(version="1.0"),
    "http-1.0-keep-alive": post("connection: keep-alive\r\n", version="1.0"),
    "http-1.0-get": ask("GET", "/v1/x", version="1.0"),
    "http-1.0-refused": ask("GET", "/nope", version="1.0"),
    "refused-post-closes": ask("POST", "/nope", "connection: close\r\ncontent-length: 2\r\n", b"{}"),
}
PIPELINED = {
    "two-gets": ask("GET", "/v1/a") + ask("GET", "/v1/b"),
    "three-posts": post(body=b'{"n": 1}') + post(body=b'{"n": 2}') + post(body=b'{"n": 3}'),
    "post-then-health": post() + ask("GET", "/health"),
    "refused-then-post": ask("GET", "/nope") + post(),
    "refused-post-then-post": post(target="/nope") + post(),
    "chunked-then-get": chunked(WHOLE) + ask("GET", "/v1/x"),
    "more-after-a-refusal-that-closes": ask("GET", "/nope", "connection: close\r\n") + ask("GET", "/v1/b"),
    "more-after-close": ask("GET", "/v1/a", "connection: close\r\n") + ask("GET", "/v1/b"),
    "more-after-http-1.0": ask("GET", "/v1/a", version="1.0") + ask("GET", "/v1/b"),
    "empty-lines-between": ask("GET", "/v1/a") + b"\r\n\r\n" + ask("GET", "/v1/b"),
    "empty-lines-before": b"\r\n\r\n" + post(),
}
CHUNKED = {
    "chunked": chunked(WHOLE),
    "chunks": chunked(b"1\r\n{\r\n00001\r\n}\r\n0\r\n\r\n"),
    "chunked-in-capitals": ask("POST", PATH, "Transfer-Encoding: Chunked\r\n", WHOLE),
    "chunked-and-empty": chunked(b"0\r\n\r\n"),
    "chunk-extensions": chunked(b'2;a=1;b="c"\r\n{}\r\n0;last\r\n\r\n'),
    "trailers": chunked(b"2\r\n{}\r\n0\r\nx-checksum: 1\r\nauthorization: Bearer evil\r\n\r\n"),
    "trailers-then-get": chunked(b"2\r\n{}\r\n0\r\nx-evil: 1\r\n\r\n") + ask("GET", "/v1/x"),
    "chunked-refused": ask("POST", "/nope", "transfer-encoding: chunked\r\n", WHOLE),
    "chunk-size-of-letters": chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk-size-negative": chunked(b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk-size-too-large": chunked(b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    "chunk-size-in-hex": chunked(b"0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk-longer-than-its-size": chunked(b"1\r\n{}\r\n0\r\n\r\n"),
    "chunk-behind-a-bare-lf": chunked(b"2\n{}\r\n0\r\n\r\n"),
    "chunk-without-an-end": chunked(b"2\r\n{}0\r\n\r\n"),
    "trailer-without-a-colon": chunked(b"2\r\n{}\r\n0\r\nnonsense\r\n\r\n"),
}
SMUGGLING = {
    "length-and-chunked": ask("POST", PATH, "content-length: 4\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"),
    "chunked-and-length": ask("POST", PATH, "transfer-encoding: chunked\r\ncontent-length: 4\r\n", b"0\r\n\r\n"),
    "lengths-that-differ": ask("POST", PATH, "content-length: 2\r\ncontent-length: 3\r\n", b"{}x"),
    "lengths-that-agree": ask("POST", PATH, "content-length: 2\r\ncontent-length: 2\r\n", b"{}"),
    "length-twice-in-one": ask("POST", PATH, "content-length: 2, 2\r\n", b"{}"),
    "length-with-a-sign": ask("POST", PATH, "content-length: +2\r\n", b"{}"),
    "length-negative": ask("POST", PATH, "content-length: -2\r\n", b"{}"),
    "length-of-letters": ask("POST", PATH, "content-length: two\r\n", b"{}"),
    "length-with-zeros": ask("POST", PATH, f"content-length: {'0' * 5000}2\r\n", b"{}"),
    "length-empty": ask("POST", PATH, "content-length: \r\n", b"{}"),
    "length-too-large": ask("POST", PATH, "content-length: 99999999999999999999\r\n", b"{}"),
    "gzip-then-chunked": ask("POST", PATH, "transfer-encoding: gzip, chunked\r\n", WHOLE),
    "chunked-then-identity": ask("POST", PATH, "transfer-encoding: chunked, identity\r\n", WHOLE),
    "chunked-twice": ask("POST", PATH, "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", WHOLE),
    "chunked-misspelt": ask("POST", PATH, "transfer-encoding: xchunked\r\n", WHOLE),
    "chunked-with-a-tab": ask("POST", PATH, "transfer-encoding:\tchunked\r\n", WHOLE),
    "space-before-a-colon": ask("POST", PATH, "content-length : 2\r\n", b"{}"),
    "folded-header": ask("GET", "/v1/x", "x-a: 1\r\n  2\r\n"),
    "bare-lf": b"GET /v1/x HTTP/1.1\nhost: x\n\n",
    "bare-cr-in-a-value": ask("GET", "/v1/x", "x-a: 1\rx-b: 2\r\n"),
    "nul-in-a-value": ask("GET", "/v1/x", "x-a: 1\x002\r\n"),
}
HEADERS = {
    "empty-value": post("x-a:\r\n"),
    "no-space-after-the-colon": post("x-a:1\r\n"),
    "not-ascii": post("x-a: caf\xe9\r\n"),
    "twice": post("x-a: 1\r\nx-a: 2\r\nset-cookie: b\r\n"),
    "request-id-given": post("x-request-id: mine-1\r\n"),
    "request-id-twice": post("x-request-id: mine-1\r\nx-request-id: mine-2\r\n"),
    "two-hosts": post("host: y\r\n"),
    "no-host": b"GET /v1/x HTTP/1.1\r\n\r\n",
    "line-without-a-colon": ask("GET", "/v1/x", "nonsense\r\n"),
    "name-with-a-space": ask("GET", "/v1/x", "x a: 1\r\n"),
    "many": ask("GET", "/v1/x", "".join(f"x-{i}: {i}\r\n" for i in range(500))),
    "long": ask("GET", "/v1/x", f"x-long: {'a' * 30_000}\r\n"),
    "expect": post("expect: 100-continue\r\n"),
    "expect-something-else": post("expect: a-miracle\r\n"),
    "expect-and-refused": ask("POST", "/nope", "expect: 100-continue\r\ncontent-length: 2\r\n"),
    "refused-at-length": post(target="/nope", body=b"x" * 60_000),
    "length-of-too-much": ask("POST", PATH, "content-length: 9000000\r\n"),
}
TARGETS = {
    "absolute": ask("GET", "http://elsewhere/v1/x?y"),
    "asterisk": ask("OPTIONS", "*"),
    "dots": ask("GET", "/v1/../admin"),
    "hidden-dots": ask("GET", "/v1/%2e%2e/admin"),
    "doubled-slash": ask("GET", "//v1/x"),
    "hidden-slash": ask("GET", "/v1%2fx"),
    "percent": ask("GET", "/v1/made%20up/%C3%A9"),
    "fragment": ask("GET", "/v1/x#y"),
    "not-ascii-target": ask("GET", "/v1/caf\xe9"),
    "long-target": ask("GET", "/v1/" + "a" * 20_000),
    "no-target": b"GET HTTP/1.1\r\nhost: x\r\n\r\n",
    "method-in-small-letters": ask("get", "/v1/x"),
    "method-unknown": ask("FOO", "/v1/x"),
    "connect": ask("CONNECT", "elsewhere:443"),
    "http-2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http-0.9": b"GET /v1/x\r\n\r\n",
    "http-1.2": ask("GET", "/v1/x", version="1.2"),
    "http-2.0": ask("GET", "/v1/x", version="2.0"),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32) + b"\r\n\r\n",
}
UPGRADES = {
    "h2c": post(OFFER),
    "h2c-get": ask("GET", "/v1/x", OFFER),
    "h2c-that-holds-a-request": post(OFFER, post(body=b'{"evil": 1}')),
    "h2c-chunked": chunked(WHOLE, OFFER),
    "h2c-twice": post(OFFER) + post(OFFER),
    "h2c-health": ask("GET", "/health", OFFER),
    "websocket": ask("GET", "/v1/realtime", WEBSOCKET),
    "upgrade-and-close": post("connection: upgrade, close\r\nupgrade: h2c\r\n"),
    "upgrade-not-in-connection": post("upgrade: h2c\r\n"),
    "connection-without-upgrade": post("connection: upgrade\r\n"),
}
REQUESTS = PLAIN | ANSWERS | CONNECTION | PIPELINED | CHUNKED | SMUGGLING | HEADERS | TARGETS | UPGRADES
