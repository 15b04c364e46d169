"""python -m tests.benchmarks.ingestion_trl FILE CACHE PROCESSES: what TRL does with a file of pairs before it tokenizes
them, which is `load_dataset` and `map(extract_prompt)`, as in its DPOTrainer. Prints the seconds without the imports.
"""

import json
import sys
import time

from datasets import load_dataset
from trl.data_utils import extract_prompt


def main(file: str, cache: str, processes: int) -> None:
    started = time.perf_counter()
    pairs = load_dataset("json", data_files=file, split="train", cache_dir=cache)
    mapped = pairs.map(extract_prompt, num_proc=processes if processes > 1 else None)
    print(json.dumps({"rows": len(mapped), "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
