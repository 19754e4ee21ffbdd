"""A fake engine as a process: HTTP on a port, nothing but the standard library, ready in a tenth of a second.

    python light_engine.py --port N --name NAME [--load S] [--fail LINE] [--token-s S] [--megabytes N] [--routes A,B]

It answers /health when it has "loaded", completions as JSON or, asked to stream, as `max_tokens` events; a request that
comes earlier, or for another model, gets a 500 that a test would see. A prompt "die" ends it. It lists
the `--routes` that it is given.
"""

import argparse
import asyncio
import json
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--name")
parser.add_argument("--load", type=float, default=0.0)
parser.add_argument("--fail", default="")
parser.add_argument("--token-s", type=float, default=0.0)
parser.add_argument("--megabytes", type=int, default=0)
parser.add_argument("--routes", default="")
given = parser.parse_args()
ready_s = time.monotonic() + given.load
ballast = bytearray(b"x") * (given.megabytes << 20)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            length = next((int(x.split(":")[1]) for x in lines if x.lower().startswith("content-length:")), 0)
            body = await reader.readexactly(length)
            await answer(writer, lines[0].split()[1], json.loads(body) if body else {})
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def answer(writer: asyncio.StreamWriter, path: str, body: dict) -> None:
    loaded = time.monotonic() >= ready_s
    if path == "/health":
        await reply(writer, 200 if loaded else 503, {})
    elif path == "/v1/models":
        await reply(writer, 200, {"data": [{"id": given.name}]})
    elif path == "/openapi.json" and given.routes:
        await reply(writer, 200, {"paths": {path: {"post": {}} for path in given.routes.split(",")}})
    elif not path.endswith("/completions"):
        await reply(writer, 404, {"error": {"message": "no such route"}})
    elif not loaded or body.get("model") != given.name:
        await reply(writer, 500, {"error": {"message": "half-loaded, or another model's"}})
    elif body.get("prompt") == "die":
        os._exit(3)
    elif body.get("prompt") == "bad":
        await reply(writer, 400, {"error": {"message": "bad prompt", "type": "BadRequestError", "code": 400}})
    elif body.get("stream"):
        await stream(writer, body.get("max_tokens", 4))
    else:
        await asyncio.sleep(given.token_s)
        await reply(writer, 200, {"model": given.name, "choices": [{"text": f"{given.name} {os.getpid()}"}]})


async def reply(writer: asyncio.StreamWriter, status: int, body: dict) -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


async def stream(writer: asyncio.StreamWriter, count: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    events = [json.dumps({"choices": [{"text": given.name}]})] * count + ["[DONE]"]
    for event in events:
        data = f"data: {event}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()
        await asyncio.sleep(given.token_s)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def main() -> None:
    if given.fail:
        print(f"(APIServer pid=1) ERROR 01-01 00:00:00 [x.py:1] RuntimeError: {given.fail}", flush=True)
        sys.exit(1)
    server = await asyncio.start_server(serve, "127.0.0.1", given.port)
    async with server:
        await server.serve_forever()


asyncio.run(main())
