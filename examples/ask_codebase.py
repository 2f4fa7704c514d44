"""Asks questions about a folder of sources: read once, kept on disk, answered with the place they came from.

    python examples/ask_codebase.py MODEL my_project/ --question "def parse(" --cache project.safetensors
    python examples/ask_codebase.py MODEL my_project/ --chat --question "Where is the port set?"

The model reads every source file, then the question, and the answer is streamed. By default a question is
text that the model continues; `--chat` puts it into the tokenizer's chat template, after the sources. Below
the answer stands the file and line that holds its longest run of tokens word for word.

With `--cache` the keys and values of the codebase are written to a file and reused by the next call: all of
them where nothing changed, else what stands before the first changed chunk. Files come after those that they
import, so a change at the top of a package rereads little.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_hf import MobaConfig
from moba_hf.evaluate.repositories import Repository, read_repository
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.generation import load, text_streamer
from moba_hf.hf.prefill import prefill
from moba_hf.hf.saved_cache import read_with_saved_cache

SHORTEST = 3  # tokens that a place must share with the answer


def find_place(answer: Tensor, sources: Tensor) -> tuple[int, int]:
    """Where in `sources (length,)` the longest run of tokens of `answer (count,)` stands, and its length."""
    best, size = 0, 0
    run = torch.zeros(len(sources), dtype=torch.long)  # of equal tokens that ends at each position
    for token in answer:
        run = torch.where(sources == token, torch.cat([run.new_zeros(1), run[:-1]]) + 1, 0)
        if int(run.max()) > size:
            size, end = int(run.max()), int(run.argmax())
            best = end - size + 1
    return best, size


def line_of(position: int, repository: Repository, tokenizer: Any) -> str:
    """The file and line of a token, `name.py:12`."""
    begin = int(repository.files[np.searchsorted(repository.files, position, side="right") - 1])
    before = tokenizer.decode(repository.ids[begin:position].tolist())
    name = before.split("\n", 1)[0].removeprefix("# ") or repository.name
    return f"{name}:{max(1, before.count(chr(10)))}"  # the comment with the name is no line of the file


def question_ids(question: str, tokenizer: Any, chat: bool) -> Tensor:
    """Token ids `(1, length)` that follow the sources."""
    text = f"\n{question}"
    if chat:
        message = [{"role": "user", "content": question}]
        text = "\n" + tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="a checkpoint, converted or not")
    add("folder", type=Path, help="of the sources")
    add("--question", action="append", required=True, help="may be given again")
    add("--cache", type=Path, help="file that keeps the codebase as read")
    add("--suffix", default=".py", help="of the files that are read")
    add("--chat", action="store_true", help="put the question into the tokenizer's chat template")
    add("--preset", help="settings to run (the checkpoint's own)")
    add("--max-new-tokens", type=int, default=48)
    add("--chunk-size", type=int, default=4096, help="tokens read at a time, and reread around a change")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    """Answers every question; returns answers and places."""
    args = parse(argv)
    model, tokenizer = load(args.model, moba=MobaConfig.from_preset(args.preset) if args.preset else None)
    repository = read_repository(args.folder, tokenizer, args.suffix)
    sources = torch.from_numpy(repository.ids.astype(np.int64))
    begun, reused = time.monotonic(), 0
    if args.cache is None:
        padded = torch.cat([sources, sources[-1:]])[None]  # `prefill` leaves the last token
        cache: Any = prefill(model, padded, args.chunk_size, dense_tail=0)
    else:
        cache, reused = read_with_saved_cache(model, sources[None], args.cache, chunk_size=args.chunk_size)
    seconds = time.monotonic() - begun
    print(
        f"{args.folder}: {len(repository.files)} files, {len(sources):,} tokens, {reused:,} of them from "
        f"the cache, {seconds:.1f} s"
    )
    held, answers = cache.get_seq_length(), []
    for question in args.question:
        print(f"\n> {question}", flush=True)
        ids = torch.cat([sources[None], question_ids(question, tokenizer, args.chat)], dim=1)
        prefill(model, ids, cache=cache, progress=False)  # the question attends every key
        made = model.generate(
            ids.to(model.device),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            streamer=text_streamer(tokenizer),
            **cache_kwargs(model.generate, cache),
        )
        new = made[0, ids.shape[1] :].cpu()
        cache.crop(held - cache.get_seq_length())  # the next question starts from the codebase again
        place, size = find_place(new, sources)
        where = line_of(place, repository, tokenizer) if size >= SHORTEST else "nowhere word for word"
        print(f"[{where}]")
        answers.append((tokenizer.decode(new, skip_special_tokens=True), where))
    return answers


if __name__ == "__main__":
    main()
