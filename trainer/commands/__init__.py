"""Commands that need ranks: one file per command."""
