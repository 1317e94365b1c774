"""What fine-tuning does to alignment while it runs: a callback for any `transformers.Trainer`."""
