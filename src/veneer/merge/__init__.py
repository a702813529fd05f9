"""Fold an adapter into the base's weights, verify the result, export it."""
