"""What a config.json says of the stored blocks of experts, checked before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laguna_serve.plugins.formats.experts import ExpertFormatError, check_stored_experts

TOY = Path(__file__).resolve().parents[1] / "toy"


@pytest.mark.parametrize(("block", "most"), [(7, 3), ("128", 1), (True, 128), (128, True), (None, 1), (128.0, 1)])
def test_blocks_that_do_not_make_an_expert_are_refused(block: Any, most: Any) -> None:
    config = json.loads((TOY / "teacher" / "config.json").read_text())
    width, experts = config["moe_intermediate_size"], config["num_experts"]
    layers = config["mlp_layer_types"].count("sparse")
    sound = {"kept_blocks": [experts] * layers, "block_size": width, "blocks_per_expert": 1}
    check_stored_experts(config, sound, "m")
    with pytest.raises(
        ExpertFormatError, match=rf"expected expert_pruning.block_size × blocks_per_expert to be {width}"
    ):
        check_stored_experts(config, sound | {"block_size": block, "blocks_per_expert": most}, "m")
