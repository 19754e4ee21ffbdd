"""The engine: requests that come and go share the passes of one decoder, in a thread of its own."""
