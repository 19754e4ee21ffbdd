"""What counts requests against limits: within one process, or in memory that several share."""
