"""What lies in a checkpoint's files: whether they are whole, and whether their tensors fit its config.json."""
