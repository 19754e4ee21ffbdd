"""The platform vLLM would detect: FAKE_PLATFORM, a CPU by default."""

import os


class _Platform:
    device_type = os.environ.get("FAKE_PLATFORM", "cpu")

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"


current_platform = _Platform()
