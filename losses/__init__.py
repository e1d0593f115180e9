"""Losses: numbers from log-probabilities or from hidden states and the head."""
