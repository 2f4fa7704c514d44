"""Asks questions about a folder of source files, which is read once and cached on disk.

    python examples/ask_codebase.py MODEL my_project/ --question "def parse(" --cache project.safetensors
    python examples/ask_codebase.py MODEL my_project/ --chat --question "Where is the port set?"

The model reads all source files, then the question, and streams the answer. By default a question is text
for the model to continue; `--chat` puts it into the tokenizer's chat template, after the sources. Below each
answer, the script prints the file and line with the longest run of tokens that the answer quotes verbatim.

With `--cache`, the keys and values of the codebase are written to a file and reused by the next call: all of
them if nothing changed, otherwise those before the first changed chunk. Files come after the files they
import, so a change in a top-level module causes little rereading.
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

SHORTEST = 3  # tokens that a passage must share with the answer to be reported


def find_place(answer: Tensor, sources: Tensor) -> tuple[int, int]:
    """Start in `sources (length,)` of the longest token run shared with `answer (count,)`, and its length."""
    best, size = 0, 0
    run = torch.zeros(len(sources), dtype=torch.long)  # length of the shared run that ends at each position
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
    return f"{name}:{max(1, before.count(chr(10)))}"  # the comment with the name is not part of the file


def question_ids(question: str, tokenizer: Any, chat: bool) -> Tensor:
    """Token ids `(1, length)` of the question, to follow the sources."""
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
    add("folder", type=Path, help="folder of source files")
    add("--question", action="append", required=True, help="a question; repeatable")
    add("--cache", type=Path, help="file for the keys and values of the codebase")
    add("--suffix", default=".py", help="suffix of the files to read")
    add("--chat", action="store_true", help="put the question into the tokenizer's chat template")
    add("--preset", help="MoBA settings to use (default: the checkpoint's own)")
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
        padded = torch.cat([sources, sources[-1:]])[None]  # `prefill` does not read the last token
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
        cache.crop(held - cache.get_seq_length())  # the next question starts from the codebase alone
        place, size = find_place(new, sources)
        where = line_of(place, repository, tokenizer) if size >= SHORTEST else "nowhere word for word"
        print(f"[{where}]")
        answers.append((tokenizer.decode(new, skip_special_tokens=True), where))
    return answers


if __name__ == "__main__":
    main()
