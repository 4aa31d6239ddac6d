"""Small talk: what the model says of itself, and that it does not know the rest."""

from __future__ import annotations

from typing import NamedTuple

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.words import CITIES, PEOPLE, PLACES, THINGS

SELF = "I am a small model, trained on one computer in a few minutes."
ABLE = "I can add and subtract small numbers, use tools and write JSON."
UNKNOWN = "I do not know. I am a small model: I can add and subtract small numbers, use tools and write JSON."

SAID = (
    (("Hello", "Hello!", "Hi", "hi", "Hey", "Good morning", "hello there", "Hi!"), "Hello! What can I do for you?"),
    (
        (
            "Who are you?",
            "What are you?",
            "who are you",
            "Are you a model?",
            "What is your name?",
            "Introduce yourself.",
        ),
        SELF,
    ),
    (("What can you do?", "Help", "help", "How can you help me?", "what can you do", "What do you know?"), ABLE),
    (("How are you?", "How do you do?", "how are you"), "I am well, thank you."),
    (("Thanks", "Thank you!", "thanks a lot", "Thank you.", "Great, thanks"), "You are welcome."),
    (("Bye", "Goodbye!", "See you", "Good night", "bye"), "Goodbye!"),
    (("Are you human?", "Are you a person?", "Are you real?"), "No, I am a small model."),
    (("Who made you?", "Where do you come from?", "Who trained you?"), "I was trained with dsv4 on one computer."),
)

OTHER = (
    "Tell me about {thing}.", "Write a poem about a {thing}.", "Who is {person}?", "Where is {place}?",
    "What is the weather in {city}?", "Tell me a joke.", "Explain how a {thing} works.", "Why is the sky blue?",
    "Write a story about {person}.", "What is the capital of {place}?", "What is the price of a {thing}?",
    "How old is {person}?", "Translate {thing} into French.", "What is the meaning of life?", "Is {city} in {place}?",
    "How do I make a {thing}?", "What is {name}?", "Who wrote {name}?", "Sing a song.", "What day is it?",
    "What time is it?", "Do you like {thing}?", "Which is better, {thing} or {name}?", "Look up {name}.",
    "Write a function that sorts a list.", "Can you draw a {thing}?", "{name}", "I like {thing}.",
    "My name is {person}.",
)  # fmt: skip
"""What the model does not know, or cannot do without a tool."""


class Said(NamedTuple):
    question: str
    reason: str
    answer: str


def draw_talk(draw: Draw, *, other: bool = True) -> Said:
    """Something that is said, and the reply. other: it may be what the model does not know."""
    if other and draw.chance(0.45):
        question = draw.choice(OTHER).format(
            thing=draw.choice(THINGS), person=draw.choice(PEOPLE), place=draw.choice(PLACES), city=draw.choice(CITIES),
            name=draw.name(),
        )  # fmt: skip
        return Said(question, "I do not know this.", UNKNOWN)
    questions, answer = draw.choice(SAID)
    return Said(draw.choice(questions), "This is small talk.", answer)
