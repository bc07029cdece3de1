"""What plans, predictions and diagnoses say in lines: printed by commands, shown by screens."""
