"""How curved the safe behaviour is in the weights, and how a fine-tuning set bends towards it."""
