"""Trials of the engine's laws on jobs drawn at random."""
