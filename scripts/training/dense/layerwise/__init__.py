"""A teacher that never lies whole in memory: its layers are read one at a time."""
