"""Contracts that two packages share. Imports neither torch nor ray."""
