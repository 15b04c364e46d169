"""A JSONL file shaped like HH-RLHF, with a known number of defects planted in it; the same bytes for the same seed.

`chosen` and `rejected` are whole transcripts of one to five exchanges, which share everything up to the last answer.
Exchanges and log-normal lengths are set so that 104,040 pairs are 151 MB, with no more than 1,024 characters a side in
nearly three quarters of them. Words are drawn by Zipf's law from some 5,800, so that two unrelated rows hardly ever
share five words running. They make no sense together, but cost what prose costs.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path

PAIRS = 104_040
BYTES = 151_000_000  # of that many pairs, within 1 %
LONG = 120  # words: one of so many changed leaves a Jaccard similarity of shingles of five words of 0.91 or more
ROWS_OF_A_CONTRADICTION = 2  # neither A > B nor B > A is kept: nothing says which of them is the mistake

_EXCHANGES = (33, 25, 20, 16, 6)  # in a hundred transcripts, those of 1, 2, 3, 4 and 5 exchanges
_QUESTION = (log(11.0), 0.75, 6)  # of the words in a turn: the mean and deviation of the logarithm; the fewest
_ANSWER = (log(21.4), 0.85, 3)
_LONGEST = 400  # words in a turn
_POOL = 1 << 17  # drawing from a list in which a word stands as often as it should is faster than weights

_COMMON = """the to and a of I you that is it in for be with have on are can not this do your what or as would if they
but how about so my like was some there at an from could one more me make people want know good think just will get
don't it's when use them then up out really which time also way I'm need help other should any you're sure has were been
their who he she than because does take where find say thing try we him her his our tell many much work most very only
well first feel better best go look being let may might right sorry yes over those two even different give something
often great home day long place year water food part start important keep friend idea never always before after life
person world back little these into too still here down off come old new high small large every own same few while again
both under last name read write learn talk show call ask answer word story book movie song play game child school
student teacher parent mother father family house room door kitchen table car road city country state law police court
money bank price cost buy sell store market company business job office team boss email letter phone number computer
program code data file list line page site link type kind form example reason problem question issue fact point case
plan step process method result test check change move turn run walk drive travel trip flight train bus bike fish dog
cat bird horse animal tree plant flower garden grass farm seed soil rain snow wind storm sun moon star sky sea river
lake beach mountain forest island land earth fire light heat cold ice warm hot dry wet clean fresh sweet salt sugar milk
bread meat rice egg butter oil sauce pepper onion garlic potato tomato apple orange fruit juice tea coffee wine beer
cook bake boil mix add cut stir serve eat drink taste smell hear sound music dance paint draw color red blue green white
black body head face eye ear hand arm leg foot heart blood skin bone brain mind sleep dream wake rest sick pain doctor
nurse drug health safe danger risk harm hurt kill fight war gun army peace king queen power leader vote party public
social history science physics nature energy gas engine machine metal gold iron stone glass paper wood cloth shirt shoe
hat coat dress wear wash brush cover open close lock key box bag cup plate knife spoon bowl pan oven fridge shelf floor
wall roof window tool hammer nail screw build fix break repair hold carry push pull lift throw catch jump climb swim
ride race win lose score goal ball café naïve résumé weekend morning evening night minute hour week month season summer
winter spring autumn birthday holiday gift card wedding marriage love hate hope fear anger joy trust respect honest
polite gentle brave smart clever quick slow easy hard simple complex true false real fake fair equal free rich poor
strong weak heavy empty full deep wide narrow short tall young early late near far left north south east west"""
_SUFFIXES = ("s", "ing", "ed", "er", "ly", "less", "ful", "ness", "like", "wise", "ship", "ward")


@dataclass(frozen=True)
class Planted:
    """What the file holds. Of `pairs` rows the rest is clean, and alike no other row."""

    pairs: int  # rows in all, malformed lines too
    identical_pairs: int  # both sides are the same
    exact_duplicates: int  # the bytes of an earlier row
    contradictory_pairs: int  # an earlier row with its sides exchanged; both rows are counted by `rejected`
    near_duplicates: int  # an earlier row with a few words of its prompt and of both answers changed; counted apart
    empty_responses: int  # one side ends after "Assistant:"
    malformed_lines: int  # cut short, not UTF-8, or no object

    @property
    def rejected(self) -> dict[str, int]:
        """How many rows must be rejected for each reason, however the near duplicates are treated."""
        return {
            "contradictory": ROWS_OF_A_CONTRADICTION * self.contradictory_pairs,
            "empty response": self.empty_responses,
            "exact duplicate": self.exact_duplicates,
            "identical pair": self.identical_pairs,
            "malformed": self.malformed_lines,
        }

    @staticmethod
    def among(pairs: int) -> "Planted":
        return Planted(pairs, pairs // 200, pairs // 100, pairs // 400, pairs // 100, pairs // 500, pairs // 2000)


_Row = tuple[str, str, str]  # the prompt up to the last "Assistant:", and the two answers with the space before them


@dataclass(frozen=True)
class _Defect:
    make: Callable[[_Row, random.Random], bytes]
    source: int  # the number of the row it is made of


def write(path: Path, pairs: int = PAIRS, seed: int = 0, *, malformed: bool = True) -> Planted:
    """Write the file row by row. Without `malformed` those lines are left out and all others are the same: for readers
    that stop at the first of them."""
    planted = Planted.among(pairs)
    defects = _places(planted, seed)
    long = {defect.source for defect in defects.values() if defect.make is _near_duplicate}
    with path.open("wb") as file:
        for number in range(pairs):
            defect = defects.get(number)
            if defect is None:
                file.write(_line(*_row(number, seed, is_long=number in long)))
            elif malformed or defect.make is not _malformed:
                row = _row(defect.source, seed, is_long=defect.source in long)
                file.write(defect.make(row, random.Random(f"{seed}, defect {number}")))
    return planted if malformed else replace(planted, pairs=pairs - planted.malformed_lines, malformed_lines=0)


def _places(planted: Planted, seed: int) -> dict[int, _Defect]:
    """The defect at each row that has one. No row is the source of two, and sources lie anywhere before."""
    alone = (
        (_identical, planted.identical_pairs),
        (_empty, planted.empty_responses),
        (_malformed, planted.malformed_lines),
    )
    repeats = (
        (_exact_duplicate, planted.exact_duplicates),
        (_contradiction, planted.contradictory_pairs),
        (_near_duplicate, planted.near_duplicates),
    )
    count = sum(n for _, n in alone) + 2 * sum(n for _, n in repeats)
    numbers = iter(random.Random(f"{seed}, places").sample(range(planted.pairs), count))
    places: dict[int, _Defect] = {}
    for make, n in alone:
        for number in [next(numbers) for _ in range(n)]:
            places[number] = _Defect(make, number)
    for make, n in repeats:
        for source, number in [sorted((next(numbers), next(numbers))) for _ in range(n)]:
            places[number] = _Defect(make, source)
    return places


def _row(number: int, seed: int, *, is_long: bool) -> _Row:
    """The clean row of this number: of nothing but it and the seed, so that a later row can be made of it again.
    A long one has a first question and two answers of LONG words at least."""
    draw = random.Random(seed << 40 | number)
    fewest = LONG if is_long else 0
    while True:
        exchanges = draw.choices(range(1, len(_EXCHANGES) + 1), _EXCHANGES)[0]
        prompt = f"\n\nHuman: {_turn(_QUESTION, '?', draw, fewest)}\n\nAssistant:"
        for _ in range(exchanges - 1):
            prompt += f" {_turn(_ANSWER, '.', draw)}\n\nHuman: {_turn(_QUESTION, '.', draw)}\n\nAssistant:"
        chosen, rejected = (f" {_turn(_ANSWER, '.', draw, fewest)}" for _ in range(2))
        if chosen != rejected:
            return prompt, chosen, rejected


def _turn(length: tuple[float, float, int], end: str, draw: random.Random, at_least: int = 0) -> str:
    mean, deviation, fewest = length
    words = min(_LONGEST, max(fewest, at_least, round(draw.lognormvariate(mean, deviation))))
    text = " ".join(draw.choices(_pool(), k=words))
    return text[0].upper() + text[1:].rstrip(".,") + end


@cache
def _words() -> tuple[str, ...]:
    """The vocabulary, the most frequent first: common words, and then what suffixes make of them."""
    common = tuple(dict.fromkeys(_COMMON.split()))
    return tuple(dict.fromkeys(common + tuple(word + suffix for suffix in _SUFFIXES for word in common[100:])))


@cache
def _pool() -> tuple[str, ...]:
    """Each word as often as Zipf's law (in Mandelbrot's form) has it, some of them at the end of a sentence."""
    weights = [1 / (rank + 2.7) for rank in range(1, len(_words()) + 1)]
    scale = _POOL / sum(weights)
    pool = [word for word, weight in zip(_words(), weights, strict=True) for _ in range(max(1, round(weight * scale)))]
    ends = {0: "."} | dict.fromkeys((5, 14), ",")  # in 23 words
    return tuple(word + ends.get(place % 23, "") for place, word in enumerate(pool))


def _line(prompt: str, chosen: str, rejected: str) -> bytes:
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _identical(row: _Row, draw: random.Random) -> bytes:
    prompt, chosen, _ = row
    return _line(prompt, chosen, chosen)


def _empty(row: _Row, draw: random.Random) -> bytes:
    prompt, answer, _ = row
    sides = [answer, draw.choice(("", " "))]
    draw.shuffle(sides)
    return _line(prompt, *sides)


def _malformed(row: _Row, draw: random.Random) -> bytes:
    line = _line(*row)
    return draw.choice((line[: len(line) // 2] + b"\n", line.replace(b"Human", b"\xff", 1), b"[" + line[:-1] + b"]\n"))


def _exact_duplicate(row: _Row, draw: random.Random) -> bytes:
    return _line(*row)


def _contradiction(row: _Row, draw: random.Random) -> bytes:
    prompt, chosen, rejected = row
    return _line(prompt, rejected, chosen)


def _near_duplicate(row: _Row, draw: random.Random) -> bytes:
    """One word changed for every LONG of them, in the prompt and in each answer."""
    prompt, chosen, rejected = (_altered(text, draw) for text in row)
    return _line(prompt, chosen, rejected)


def _altered(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.isalpha()]  # no "Human:", no ends of sentences
    for place in draw.sample(places, len(words) // LONG):
        words[place] = next(word for word in draw.sample(_words(), 2) if word != words[place])
    return " ".join(words)
