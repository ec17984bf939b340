"""Pure losses: tensors in, one value per sample out. Noise and time are arguments, nothing is drawn here."""
