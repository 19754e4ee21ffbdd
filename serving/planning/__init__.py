"""What serving a checkpoint on a device takes, worked out before anything is started."""
