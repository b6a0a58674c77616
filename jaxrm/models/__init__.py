"""Decoders, their weights and sampling, written as single-device code."""
