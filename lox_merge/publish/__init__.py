"""What was hardened, made ready for others: the model card, and the way to the Hub."""
