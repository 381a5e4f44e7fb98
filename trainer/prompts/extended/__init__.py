"""Rarely used encoders: LSTM, residual MLP, low-rank multitask prompts, MLP for prefix tuning."""
