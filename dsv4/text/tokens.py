"""The special tokens of V4, by their text."""

from __future__ import annotations

BAR, GAP = "\uff5c", "\u2581"  # the fullwidth bar and the low block in the names of special tokens

BOS = f"<{BAR}begin{GAP}of{GAP}sentence{BAR}>"
EOS = f"<{BAR}end{GAP}of{GAP}sentence{BAR}>"
PAD = f"<{BAR}{GAP}pad{GAP}{BAR}>"
FIM_HOLE, FIM_BEGIN, FIM_END = (f"<{BAR}fim{GAP}{word}{BAR}>" for word in ("hole", "begin", "end"))

USER, ASSISTANT, LATEST_REMINDER = (f"<{BAR}{word}{BAR}>" for word in ("User", "Assistant", "latest_reminder"))
THINK, END_THINK = "<think>", "</think>"
DSML = f"{BAR}DSML{BAR}"  # the angle brackets around it are ordinary text
EXTRACTED_URL = f"<{BAR}extracted_url{BAR}>"  # between a text and its address, for the task read_url

TASKS = {name: f"<{BAR}{name}{BAR}>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
"""The quick-instruction tokens: each asks for one short answer about the conversation."""

SPECIAL_TOKENS = (
    BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>",
    THINK, END_THINK, DSML, f"<{BAR}begin{GAP}sys{BAR}>", f"<{BAR}end{GAP}sys{BAR}>",
    LATEST_REMINDER, TASKS["action"], TASKS["query"], TASKS["authority"],
    TASKS["domain"], TASKS["title"], EXTRACTED_URL, TASKS["read_url"],
)  # fmt: skip
"""The released special tokens that V4 uses, in the order of their ids there."""
