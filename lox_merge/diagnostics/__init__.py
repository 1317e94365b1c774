"""Questions about models that need no prompts: what the weights say."""
