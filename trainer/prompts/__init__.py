"""Prompts: initialisers start them, encoders make virtual tokens, the bank trains them together."""
