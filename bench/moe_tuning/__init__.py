"""Which tiles of the sentinel MoE kernels are fastest on a GPU: the command that writes its table."""
