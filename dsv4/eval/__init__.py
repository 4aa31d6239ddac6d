"""What a model is worth: bits per byte beside an n-gram baseline, and text it goes on with."""
