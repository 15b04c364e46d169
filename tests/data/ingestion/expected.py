"""What the rows of each sample file become, written by hand: records in the file's order, or (reason, field)."""

from collections.abc import Mapping

from data.records import Comparison, Demonstration, Message, PlainText, Prompt, Record, Role, Verdict

Expected = Record | tuple[str, str]


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """The contents as turns, the user's first."""
    order: tuple[Role, Role] = ("user", "assistant")
    start = () if system is None else (Message("system", system),)
    return start + tuple(Message(order[index % 2], content) for index, content in enumerate(contents))


def pair(
    prompt: str | tuple[Message, ...],
    chosen: str,
    rejected: str,
    *,
    margin: float | None = None,
    preference: float = 1.0,
) -> Comparison:
    asked = turns(prompt) if isinstance(prompt, str) else prompt
    return Comparison(asked, chosen, rejected, "", margin, preference)


def shown(*contents: str, system: str | None = None) -> Demonstration:
    return Demonstration(turns(*contents, system=system), "")


def judged(prompt: str, response: str, is_good: bool) -> Verdict:
    return Verdict(turns(prompt), response, is_good, "")


EXPECTED: Mapping[str, list[Expected]] = {
    "trl-preference": [
        pair("Name a colour.", "Blue.", "Seven."),
        pair("Name a tree.", "Oak.", "Trout.", margin=2.0),
        pair("Hi", "Hello!", "Go away."),
        pair("The sea is", "deep.", "square."),
        pair("Tea or coffee?", "Tea.", "Coffee.", preference=0.5),
        ("identical pair", "rejected"),
        ("missing field", "rejected"),
    ],
    "hh-rlhf": [
        pair("Is rain wet?", "Yes, it is.", "No."),
        pair(turns("Hi", "Hello.", "Name two birds.\n\nWith a blank line."), "Wren.\n\nOwl.", "Dog."),
        pair("Is ice cold?", "Yes.", "Ask me later."),
        ("prompts differ", "rejected"),
        ("identical pair", "rejected"),
        ("empty response", "rejected"),
        ("role order", "chosen"),
        ("malformed", "rejected"),
    ],
    "openai-preference": [
        pair("How cold is it?", "Nine degrees.", "Cold."),
        pair(turns("I failed.", system="Be kind."), "That is hard.", "So?"),
        ("role order", "preferred_output[0]"),
        ("wrong type", "preferred_output[0].content"),
        ("missing field", "non_preferred_output"),
    ],
    "sharegpt-preference": [
        pair(turns("Hi", "Hello.", "A riddle?"), "What has keys but no door? A piano.", "No."),
        pair(turns("Count to two.", system="Be brief."), "One, two.", "One, three."),
        pair(turns("Joke?", system="Be dull."), "No.", "Ha!"),
        ("identical pair", "rejected"),
        ("role order", "prompt"),
    ],
    "alpaca-preference": [
        pair("Translate to French.\n\ncat", "chat", "chien"),
        pair("Add.\n\n1 and 2", "3", "12"),
        pair(turns("Say a.", "a", "And again.", system="Be brief."), "a", "b"),
        ("malformed", "output"),
        ("malformed", "history[0]"),
    ],
    "oasst-trees": [
        pair("Best pet?", "A cat.", "A dog."),
        pair("Best pet?", "A dog.", "A stone."),
        pair(turns("Best pet?", "A cat.", "Why a cat?"), "It purrs.", "Dunno."),
        pair("Best tree?", "Oak.", "Elm."),
        pair("Best tea?", "Green.", "Black."),
        pair(turns("Best tea?", "Green.", "Why green?"), "Taste.", "Colour."),
        pair(turns("Best tea?", "Black.", "Why black?"), "Strength.", "Smell."),
        ("no ranked answers", "prompt"),
        ("no ranked answers", "prompt"),
    ],
    "ultrafeedback": [
        pair("Name a metal.", "Iron.", "Wood.", margin=6.5),
        pair("Name a gas.", "Argon.", "Neon.", margin=2.5),
        pair("Name an acid.", "Citric.", "Water.", margin=3.5),  # 5 - (2 + 1) / 2
        pair("Name a salt.", "Table salt.", "Sea salt.", preference=0.5),
        pair("Name a stone.", "Quartz.", "Mud.", margin=1.0),  # the first has NaN for a rating
        ("no ratings", "completions"),
        ("missing field", "response"),
    ],
    "summarize-from-feedback": [
        pair("My dog ate my shoe.\n\nTL;DR:", "Dog ate shoe.", "Dog."),
        pair("The bridge opened today.\n\nTL;DR:", "Bridge open.", "Bridge."),
        ("malformed", "summaries"),
        ("missing field", "choice"),
        ("missing field", "article"),
    ],
    "trl-unpaired": [
        judged("Help me.", "Gladly.", True),
        judged("Help me.", "No.", False),
        ("empty response", "completion"),
        ("missing field", "completion"),
    ],
    "thumbs": [
        judged("Help me.", "Gladly.", True),
        judged("Help me.", "No.", False),
        judged("Help me.", "Later.", False),
        judged("Help me.", "Now.", True),
        judged("Help me.", "Now.", True),
        judged("Help me.", "Never.", False),
        ("wrong type", "thumbs"),
    ],
    "trl-messages": [
        shown("Hi", "Hello."),
        shown("One, two?", "Three.", system="Be brief."),
        shown("Hi", "Hey.", "Bye", "Bye."),
        ("role order", "messages[1]"),
        ("role order", "messages[1].role"),
        ("unlearnt turn", "messages[1].weight"),
        ("role order", "messages"),
    ],
    "trl-prompt-completion": [
        shown("The sky is", " blue."),
        shown("The sea?", "Deep."),
        ("empty response", "completion"),
        ("wrong type", "completion"),
    ],
    "sharegpt": [
        shown("Hi", "Hello."),
        shown("Hi", "Hey.", system="Be brief."),
        shown("Hi", "Hello.", "Bye", "Bye.", system="Be kind."),
        ("role order", "messages"),
        ("role order", "messages[1].role"),
    ],
    "alpaca": [
        shown("Name a river.", "The Rhine."),
        shown("Shorten.\n\nIt is raining.", "Rain."),
        shown("Name a sea.", "The Baltic.", "And a lake?", "Como.", system="Be brief."),
        ("empty response", "messages"),
        ("wrong type", "input"),
    ],
    "text": [
        PlainText("Once upon a time.", ""),
        PlainText("The end.", ""),
        ("empty text", "text"),
        PlainText("Rivers run.", ""),
        ("missing field", "prompt"),
    ],
    "trl-prompt": [
        Prompt(turns("Write a poem."), ""),
        Prompt(turns("Write a line.", system="Be brief."), ""),
        Prompt(turns("Hi", "Hello.", "A poem?"), ""),
        ("empty prompt", "prompt"),
        ("role order", "prompt"),
    ],
}

EXPECTED_OF_TABLES: Mapping[str, list[Expected]] = {
    "shp.tsv": [
        pair("How do I boil an egg?", "Eight minutes.", "Ask a hen.", margin=2.5),
        pair("How do I whistle?", "Round the lips.", "No idea."),
        ("wrong type", "labels"),
        ("identical pair", "rejected"),
    ],
    "pku-saferlhf.csv": [
        pair("How do I pick a lock?", "Is it yours?", "Like this."),
        pair("How do I cook rice?", "Boil it.", "Burn it."),
        pair("How do I sing?", "Loudly.", "Softly.", preference=0.5),
        ("wrong type", "better_response_id"),
    ],
    "dolly.csv": [
        shown("When was it built?\n\nThe tower was built in 1889.", "In 1889."),
        shown("Name a planet.", "Mars."),
        ("empty response", "completion"),
        ("empty prompt", "completion"),
    ],
}
