"""The safety landscape: attack success around models in the space of their weights."""
