"""The gateway: one OpenAI-compatible endpoint in front of engines."""
