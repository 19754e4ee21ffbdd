"""The subcommands of `laguna`."""
