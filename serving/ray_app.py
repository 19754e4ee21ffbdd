"""The same models on Ray Serve: replicas on many machines, added and ended as there is work.

    serve run laguna_serve.serving.ray_app:build config=cluster.toml

or in a file of Ray's own, `import_path: laguna_serve.serving.ray_app:build` and `args: {config: /shared/cluster.toml}`.
What is in the configuration: serving/cluster/cluster.example.toml; what for: docs/scaling.md.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from laguna_serve.serving.cluster.config import (
    ClusterConfig,
    ClusterModel,
    Replicas,
    list_waiting,
    load_cluster,
    parse_cluster,
)
from laguna_serve.serving.cluster.ingress import Ingress
from laguna_serve.serving.cluster.keeper import WeightKeeper
from laguna_serve.serving.cluster.replica import MARGIN_S, Replica
from laguna_serve.serving.kit.results import JsonObject

KEEPER, INGRESS = "weights", "ingress"
# Of a deployment that only passes things on.
MANY = 10_000
PREFIX_ROUTER = "ray.serve.llm.request_router:PrefixCacheAffinityRouter"
# Beyond so many requests more in one replica than in another, load goes before prefixes.
IMBALANCE = 16
MAX_PREFIX_CHARS = 4_000_000
logger = logging.getLogger("ray.serve")


def build(args: JsonObject) -> serve.Application:
    """Build the application of `args["config"]`, a file, or of `args` themselves, tables as the file has them.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    given = dict(args)
    config = load_cluster(Path(given["config"])) if set(given) == {"config"} else parse_cluster(given, "args")
    if ray.is_initialized():  # Ray itself says after half a minute what it waits for
        for line in list_waiting(config, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
            logger.warning(line)
    return build_app(config)


def build_app(config: ClusterConfig) -> serve.Application:
    """Build the application of a configuration: the ingress, the replicas of each model, the keeper of weights."""
    replicas = {model.name: _deploy(model, number) for number, model in enumerate(config.models)}
    updatable = {model.name: replicas[model.name] for model in config.models if model.engine.weight_updates}
    keeper = None
    if updatable:
        options: JsonObject = {"num_replicas": 1, "max_ongoing_requests": MANY, "ray_actor_options": {"num_cpus": 0}}
        options["logging_config"] = {"enable_access_log": False}  # every replica asks it every few seconds
        keeper = serve.deployment(WeightKeeper).options(name=KEEPER, **options).bind(config.weights.file, updatable)
    front = serve.deployment(Ingress).options(
        name=INGRESS,
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
    )
    return front.bind(replicas, keeper, config.weights.sha256)


def _deploy(model: ClusterModel, number: int) -> serve.Application:
    wanted = model.replicas
    options: JsonObject = {
        "name": f"engine-{number}-{re.sub(r'[^A-Za-z0-9_-]', '-', model.name)}",
        "max_ongoing_requests": wanted.max_ongoing_requests,
        "autoscaling_config": {
            "min_replicas": wanted.min_replicas,
            "max_replicas": wanted.max_replicas,
            "target_ongoing_requests": wanted.target_ongoing_requests,
            "upscale_delay_s": wanted.upscale_delay_s,
            "downscale_delay_s": wanted.downscale_delay_s,
            "look_back_period_s": wanted.look_back_period_s,
        },
        "health_check_period_s": wanted.health_period_s,
        "graceful_shutdown_timeout_s": wanted.shutdown_timeout_s + MARGIN_S,
        "ray_actor_options": {"num_cpus": wanted.num_cpus, "num_gpus": wanted.num_gpus},
    }
    if (router := find_router(wanted)) is not None:
        options["request_router_config"] = router
    keeper = KEEPER if model.engine.weight_updates else None
    # No table of replicas: Ray replaces replicas whose arguments change, and those that stay need not load again.
    return serve.deployment(Replica).options(**options).bind(model.name, model.engine, keeper)


def find_router(wanted: Replicas) -> RequestRouterConfig | None:
    """Find Ray's router for a model; None is its default, power of two choices."""
    if wanted.routing != "prefix":
        return None
    # Its tree of prompts grows without end unless it is told to evict.
    bounds = {"do_eviction": True, "eviction_threshold_chars": MAX_PREFIX_CHARS, "imbalanced_threshold": IMBALANCE}
    bounds["eviction_target_chars"] = MAX_PREFIX_CHARS * 9 // 10
    return RequestRouterConfig(request_router_class=PREFIX_ROUTER, request_router_kwargs=bounds)
