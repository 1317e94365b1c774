"""What models expect, token by token: how far alignment moved it from the base model, and how far fine-tuning moved it back."""
