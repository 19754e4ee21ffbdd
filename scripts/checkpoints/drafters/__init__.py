"""DFlash drafters in both formats: as plain PyTorch, and the algebra from one to the other."""
