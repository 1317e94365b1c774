"""Who writes the shards of a plan: this process one after another, or several at a time. The bytes are the same."""
