"""Compare speed, FLOPs and memory per useful token with PEFT, ZeRO-3 and TRL."""
