"""One self-contained page from the JSON of any runs."""
