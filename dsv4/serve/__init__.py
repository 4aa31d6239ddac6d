"""A model behind the web: the protocols of chat clients, and what they share."""
