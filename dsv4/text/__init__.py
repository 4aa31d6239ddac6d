"""Messages and the text a chat model reads and writes: encode a conversation, parse a completion. No torch, no ids."""
