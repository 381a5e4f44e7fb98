"""How fast prompts learn, and how far: this trainer's defaults beside PEFT at its best rate."""
