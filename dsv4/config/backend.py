"""The implementations of operations that a user may ask for by name; ``dsv4.ops.backend`` says what each is."""

from __future__ import annotations

from typing import Literal

BackendChoice = Literal["auto", "reference", "portable", "native", "compiled", "triton", "unproved"]
