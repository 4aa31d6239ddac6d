"""Models to and from directories in the released layout: names, shards, index, config."""
