"""The mergekit outlet: the merge method `lox` (plugin), and merges with it that are checked first and whole in the end."""
