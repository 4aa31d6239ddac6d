"""From a pile of text to rows of tokens: sources, tokenizer, token store, packing, loader (report 4.1)."""
