"""The same completions under two framings: how alike a model finds them, and where each would move its weights."""
