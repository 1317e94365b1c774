"""Where in a model's hidden states alignment is: directions, residuals, and subspaces of activations."""
