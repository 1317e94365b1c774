"""Jobs: what is asked (recipe), what will be done (plan), doing it shard by shard (engine), and what was done (manifest)."""
