"""Reinforcement learning and preference optimisation."""
