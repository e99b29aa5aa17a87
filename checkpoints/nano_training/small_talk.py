"""Greetings, thanks, names, who nano is and echoes.

Knows a few styles of each; the answers are always in nano's own.
"""

from __future__ import annotations

from collections.abc import Callable

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import CITIES, FIRST_NAMES, WORDS, invented_word

# What people say, what nano thinks, what nano answers.
_PHRASES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("Hi", "Hi!", "Hello", "Hello!", "Hey", "Hey there!", "Hi there", "Hello there!", "Good day",
         "Greetings!", "hi nano", "Hello nano!"),
        "The user greets me.",
        "Hello! How can I help you?",
    ),
    (
        ("Good morning", "Good morning!", "Morning!", "A very good morning to you!"),
        "The user says good morning.",
        "Good morning! How can I help you?",
    ),
    (
        ("Good evening", "Good evening!", "Evening!", "A good evening to you!"),
        "The user says good evening.",
        "Good evening! How can I help you?",
    ),
    (
        ("How are you?", "How are you doing?", "How do you do?", "How is it going?", "Are you well?",
         "How are you today?", "Hi, how are you?", "Hello! How are you?"),
        "The user asks how I am.",
        "I am fine, thank you. How can I help you?",
    ),
    (
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much!", "Thanks a lot!",
         "Great, thanks!", "That helped, thank you."),
        "The user thanks me.",
        "You are welcome!",
    ),
    (
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you!", "See you later", "Good night!",
         "I have to go now."),
        "The user says goodbye.",
        "Goodbye! Have a nice day.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
         "Introduce yourself.", "What's your name?", "Which model are you?", "Are you a robot?"),
        "The user asks who I am.",
        "I am nano, a very small GLM model that runs in glm-jax.",
    ),
    (
        ("What can you do?", "What can you help me with?", "How can you help me?", "Help",
         "What do you know?", "Can you help me?"),
        "The user asks what I can do.",
        "I know capitals, small sums, lists, JSON and tools. Ask me something!",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Can you tell me a joke?"),
        "The user wants a joke.",
        "Why did the tensor cross the mesh? To get to the other shard.",
    ),
    (
        ("Tell me a fun fact.", "Do you know a fun fact?", "Tell me something interesting."),
        "The user wants a fact.",
        "A year on Mars has 687 days.",
    ),
    (
        ("I am happy", "I am happy today!", "I feel great!", "What a nice day!"),
        "The user is happy.",
        "That is good to hear!",
    ),
    (
        ("I am sad", "I am sad today.", "I feel bad.", "What a bad day!"),
        "The user is sad.",
        "I am sorry to hear that. I hope it gets better soon.",
    ),
    (
        ("Say hello to the world.", "Say hello world.", "Write hello world."),
        "The user wants a greeting for the world.",
        "Hello, world!",
    ),
    (
        ("Say this is a test.", "Say this is a test", "Say: this is a test."),
        "The user wants me to say this is a test.",
        "This is a test.",
    ),
    (
        ("What is the meaning of life?", "Who won the game last night?", "Write a poem about love.",
         "Explain quantum physics.", "Who is the president?", "What is the best phone?",
         "How do I cook pasta?", "Write a Python program."),
        "I do not know that.",
        "I am a very small model and do not know that. Ask me about capitals or small sums!",
    ),
)  # fmt: skip

_REMARKS = frozenset(remark for said, _, _ in _PHRASES for remark in said)
_NAME_PHRASINGS = (
    "My name is {}.",
    "I am {}.",
    "Hi, I am {}.",
    "Hello, my name is {}.",
    "Call me {}.",
    "I'm {}, nice to meet you.",
)
_ECHO_PHRASINGS = (
    'Repeat after me: "{}"',
    'Repeat: "{}"',
    'Say: "{}"',
    'Please repeat: "{}"',
    'Write exactly this: "{}"',
    'Echo "{}"',
)


def ask_small_talk(draw: Draw) -> Exchange:
    """One friendly exchange."""
    ask: Callable[[Draw], Exchange] = draw.weighted({ask_phrase: 6, _echo: 2, _name: 1})
    return ask(draw)


def ask_phrase(draw: Draw) -> Exchange:
    """A greeting or another fixed remark; held out: one in ten of the ways to vary its wording."""
    while True:
        said, thinking, content = draw.choice(_PHRASES)
        remark = draw.casual(draw.choice(said))
        if remark in _REMARKS:
            # What a remark means cannot be guessed, so all of them are in training.
            if not draw.held_out:
                break
        elif draw.admits("small talk", remark):
            break
    return answer("small talk", remark, thinking, content, Check(equals=content))


def _name(draw: Draw) -> Exchange:
    while True:
        name, phrasing = draw.choice(FIRST_NAMES), draw.choice(_NAME_PHRASINGS)
        if draw.admits(phrasing, name):
            break
    content = f"Nice to meet you, {name}!"
    thinking = f"The user's name is {name}."
    return answer("small talk", phrasing.format(name), thinking, content, Check(equals=content))


def _echo(draw: Draw) -> Exchange:
    while True:
        text = " ".join(_echoed_word(draw) for _ in range(draw.integer(1, 6)))
        if draw.admits("echo", text):
            break
    question = draw.choice(_ECHO_PHRASINGS).format(text)
    return answer(
        "echo", question, "The user wants me to repeat the text.", text, Check(equals=text)
    )


def _echoed_word(draw: Draw) -> str:
    if draw.chance(0.15):
        return str(draw.integer(0, 9999))
    if draw.chance(0.2):
        return invented_word(draw)
    return draw.choice(draw.choice((WORDS, FIRST_NAMES, CITIES)))
