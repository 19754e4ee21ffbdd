"""`python -m laguna_serve.plugins.diffusion.server MODEL`: what `laguna serve` starts for a LLaDA."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random, SystemRandom

from laguna_serve.plugins.diffusion.errors import DiffusionError
from laguna_serve.plugins.diffusion.server.options import ServerOptions, parse_options

# Streams under way get so long after SIGTERM, within what the launcher's supervisor allows.
GRACE_S = 8
STOP_S = 5.0
REFUSED, DIED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine dies. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(parse_options(sys.argv[1:] if argv is None else argv))
    except DiffusionError as error:
        print(f"diffusion server: error: {error}", file=sys.stderr)
        return REFUSED


def run(options: ServerOptions) -> int:
    """Load, start the engine, and serve.

    Raises:
        DiffusionError: what is named cannot be served.
    """
    log = logging.getLogger("laguna_serve.plugins.diffusion.server")
    log.info("Starting a masked diffusion engine: importing torch")
    # Here, as a wrong option is to be refused at once.
    import uvicorn

    from laguna_serve.plugins.diffusion.engine.loop import Engine
    from laguna_serve.plugins.diffusion.engine.metrics import EngineMetrics
    from laguna_serve.plugins.diffusion.engine.requests import Limits
    from laguna_serve.plugins.diffusion.server.access import KEY_VARIABLE, add_access
    from laguna_serve.plugins.diffusion.server.app import Service, make_app
    from laguna_serve.plugins.diffusion.server.choices import Defaults
    from laguna_serve.plugins.diffusion.server.loading import load

    log.info("Starting to load model %s", options.model)
    served = load(options)
    name = options.served_model_name or Path(options.model).resolve().name
    metrics = EngineMetrics(name, speculates=served.decoder.speculation is not None)

    def end() -> None:
        server.should_exit = True

    engine = Engine(
        served.decoder,
        metrics,
        Limits(
            sequence=served.max_model_len,
            vocabulary=served.vocab_size,
            running=options.max_num_seqs,
            waiting=options.max_waiting,
            tokens=served.room,
            open_positions=served.open_room,
        ),
        on_death=end,
    )
    seeds = SystemRandom() if options.seed is None else Random(options.seed)
    defaults = Defaults(options.canvas_length, options.block_length, seeds)
    app = make_app(Service(engine, served, defaults, name, options.model))
    add_access(app, os.environ.get(KEY_VARIABLE), options.allowed_origins)
    settings = uvicorn.Config(
        app, options.host, options.port, timeout_graceful_shutdown=GRACE_S, log_level="warning", access_log=False
    )
    server = uvicorn.Server(settings)
    log.info("Starting the HTTP server at %s:%d", options.host, options.port)
    # uvicorn obeys signals while it serves, and raises them again afterwards, which would end us before the engine.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    engine.start()
    try:
        server.run()
    finally:
        engine.stop()
        engine.join(STOP_S)
    if engine.cause is not None:
        log.error("the engine died: %s", engine.cause)
    return DIED if engine.cause is not None or not server.started else 0


if __name__ == "__main__":
    sys.exit(main())
