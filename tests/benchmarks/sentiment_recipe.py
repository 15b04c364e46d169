"""How data/samples/sentiment/ was made: python -m tests.benchmarks.sentiment_recipe DIR (some 10 minutes on two cores).

All text is our own: prompts from the two lists below, answers from the embedded model. One answer is the first
sentence of what the raw base says at temperature 1. Prompts are split by topic, so that none is in both splits.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.context import Sampling
from align.evaluation.gold import base_nll, gold_score
from align.generation import generate
from align.randomness import keyed_uniforms
from data.records import Message
from data.tokenization import Codec, decode_response, encode_prompt

SYSTEM_PROMPT = "Answer in one short sentence."
TEMPLATES = (
    "What do you think about {}?",
    "Tell me about {}.",
    "How do you feel about {}?",
    "Describe {}.",
    "Say something about {}.",
    "What is {} like?",
)
TOPICS = (
    "rainy mornings", "the local library", "a long train ride", "Monday meetings", "homemade soup", "city traffic",
    "an old bicycle", "the night shift", "a quiet village", "grocery shopping", "learning the piano", "winter evenings",
    "a crowded bus", "the neighbour's cat", "fresh bread", "doing the laundry", "a walk in the park", "spicy food",
    "the first day of school", "a broken umbrella", "public speaking", "a cup of tea", "the school cafeteria",
    "mountain hiking", "a flat tyre", "board games", "the morning news", "a new haircut", "planting tomatoes",
    "a visit to the dentist", "the village market", "working from home", "a wooden chair", "late trains",
    "the autumn leaves", "a shared kitchen", "country roads", "a power cut", "writing letters", "the fish market",
    "a job interview", "summer storms", "a second-hand coat", "the office printer", "swimming lessons",
    "a foggy harbour", "paper maps", "waiting in line", "a family dinner", "the corner bakery", "cold showers",
    "a lost wallet", "small talk", "the town square", "a camping trip", "cleaning the garage", "black coffee",
    "a long winter", "the football match", "a noisy hotel", "street musicians", "an empty beach", "tax forms",
    "a birthday party", "the new bridge", "a slow computer", "fishing at dawn", "an evening class", "the old cinema",
    "a garden fence", "riding a horse", "a missed call", "the science museum", "moving house", "a rusty gate",
    "early mornings", "a packed lunch", "the bus driver", "fixing a clock", "a sudden change of plans",
    "dark chocolate",
    "a rented flat", "the weekly quiz", "growing older", "a snowy street", "the swimming pool", "an unread book",
    "a team project", "the airport queue", "a pair of boots", "living by the sea", "a difficult exam", "the town choir",
    "a day off", "the recycling bins", "a visit from relatives",
)  # fmt: skip
HELD_OUT_TOPICS = 24
SAMPLES = {"train": 12, "held_out": 8}  # answers a prompt
MIN_GAP = 0.1  # near-ties are left out
FLIP_RATE = 0.1  # of the training labels
MAX_TOKENS = 32
DEMONSTRATIONS = {"train": 240, "held_out": 60}


@dataclasses.dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    num_tokens: int
    nll: float
    gold: float


def make_prompts() -> dict[str, list[str]]:
    topics = list(TOPICS)
    random.Random(0).shuffle(topics)
    split = {"held_out": topics[:HELD_OUT_TOPICS], "train": topics[HELD_OUT_TOPICS:]}
    prompts = {name: [t.format(topic) for topic in own for t in TEMPLATES] for name, own in split.items()}
    for own in prompts.values():
        random.Random(1).shuffle(own)
    return prompts


def answer(model: AdaptedModel, codec: Codec, prompts: list[str], count: int, seed: int) -> list[Answer]:
    """`count` one-sentence answers to each prompt; what does not end within MAX_TOKENS is left out."""
    vocabulary = codec.tokenizer.get_vocab()
    ends = tuple(sorted(i for token, i in vocabulary.items() if token and token[-1] in ".!?" and token[:1] not in "<"))
    stop_at_sentence = dataclasses.replace(codec, eos_ids=(*codec.eos_ids, *ends))
    texts = [prompt for prompt in prompts for _ in range(count)]
    ids = [tuple(encode_prompt(codec, (Message("user", prompt),))) for prompt in texts]
    sampling = Sampling(temperature=1.0, max_response_length=MAX_TOKENS, max_prompt_length=256, batch_size=64)
    uniforms = keyed_uniforms(seed, "recipe", 0, list(range(len(ids))), MAX_TOKENS)

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)

    found = generate(model, stop_at_sentence, ids, sampling=sampling, uniforms_BT=uniforms, on_progress=show)
    whole = [i for i, response in enumerate(found) if response.has_eos and len(response.ids) >= 4]
    nlls = base_nll(model, codec, [ids[i] for i in whole], [found[i].ids for i in whole])
    answers = []
    for i, nll in zip(whole, nlls, strict=True):
        text = decode_response(codec, found[i].ids).strip()
        if text and "\n" not in text:
            answers.append(Answer(texts[i], text, len(found[i].ids), nll, gold_score(text, nll)))
    return answers


def make_pairs(answers: list[Answer], rng: random.Random, flip_rate: float) -> list[dict[str, object]]:
    """Each answer is in one pair at most."""
    pairs = []
    by_prompt: dict[str, list[Answer]] = {}
    for one in answers:
        by_prompt.setdefault(one.prompt, []).append(one)
    for prompt, own in by_prompt.items():
        rng.shuffle(own)
        for a, b in zip(own[::2], own[1::2], strict=False):
            if abs(a.gold - b.gold) < MIN_GAP:
                continue
            better, worse = (a, b) if a.gold > b.gold else (b, a)
            if rng.random() < flip_rate:
                better, worse = worse, better
            pairs.append({"prompt": prompt, "chosen": better.text, "rejected": worse.text})
    rng.shuffle(pairs)
    return pairs


def make_demonstrations(answers: list[Answer], rng: random.Random, count: int) -> list[dict[str, object]]:
    """Short, fluent, of neutral gold on average: one a prompt as far as they go."""
    fluent = [a for a in answers if a.nll < 2.5 and a.num_tokens <= 20 and -0.4 <= a.gold <= 0.6]
    rng.shuffle(fluent)
    seen: set[str] = set()
    first = [a for a in fluent if not (a.prompt in seen or seen.add(a.prompt))]
    rest = [a for a in fluent if a not in first]
    chosen = [*first, *rest][:count]
    print(f"\ndemonstrations: {len(chosen)}, mean gold {sum(a.gold for a in chosen) / len(chosen):.3f}")
    return [{"prompt": a.prompt, "completion": a.text} for a in chosen]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = AdaptedModel(load_base(BaseModelConfig(dtype="bfloat16")), AdaptersConfig())
    codec = model.base.codec(SYSTEM_PROMPT)
    for seed, (name, prompts) in enumerate(make_prompts().items()):
        rng = random.Random(seed)
        answers = answer(model, codec, prompts, SAMPLES[name], seed)
        log = folder / f"answers-{name}.jsonl"
        write(log, [dataclasses.asdict(a) for a in answers])
        write(folder / f"prompts-{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
        flip_rate = FLIP_RATE if name == "train" else 0.0
        write(folder / f"pairs-{name}.jsonl", make_pairs(answers, rng, flip_rate))
        write(folder / f"demonstrations-{name}.jsonl", make_demonstrations(answers, rng, DEMONSTRATIONS[name]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
