"""What a distillation leaves behind besides the student: figures, logs, pictures, and a card."""
