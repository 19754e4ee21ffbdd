"""What a distillation takes before it is begun: memory, disk, arithmetic and hours."""
