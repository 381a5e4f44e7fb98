"""Compare how prompts learn: this trainer's defaults and PEFT at its best learning rate."""
