"""Attack success and utility around a model and between models: points made in memory, measured, and taken back."""
