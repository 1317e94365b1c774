"""What a model does with prompts: replies, judges, attack success, and the searches and comparisons built on them."""
