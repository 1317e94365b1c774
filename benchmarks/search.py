"""What a rank search costs beside the evaluations that it consists of.

    python benchmarks/search.py FOLDER [--size 468M] [--prompts 100] [--tokens 60] [--repeat 1]

Whole programs, from command to result: `lox-merge search` over the authors' seven ranks (which evaluates the aligned model too),
against seven times `lox-merge asr` on the aligned model, with the same prompts. The pair is synthetic and made in FOLDER on first
use; its words mean nothing, so the judge's verdicts do not matter, only the time to get them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measure import run_command
from synthetic import SIZES, make_pair
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

RANKS = "0,1,2,3,4,6,8"
# Decides on everything, whatever it says.
JUDGE = "def long(prompt, reply):\n    return len(reply) > len(prompt)\n"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def add_tokenizer(folder: Path, vocabulary: int, *, chat: bool) -> None:
    """One token a word: w0, w1, … None of them ends a reply, so that every reply has its full length."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocabulary)}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", clean_up_tokenization_spaces=False)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="468M", choices=SIZES)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.folder / arguments.size, arguments.size)
    for path in (base, aligned):
        add_tokenizer(path, SIZES[arguments.size].vocabulary, chat=path == aligned)
    prompts = arguments.folder / "prompts.txt"
    words = SIZES[arguments.size].vocabulary - 3
    prompts.write_text("\n".join(" ".join(f"w{3 + (97 * row + 31 * place) % words}" for place in range(16)) for row in range(arguments.prompts)))
    program = str(Path(sys.executable).parent / "lox-merge")
    common = ["--prompts", str(prompts), "--max-new-tokens", str(arguments.tokens), "--no-cache", "--device", arguments.device]
    (arguments.folder / "judge.py").write_text(JUDGE)
    judge = ["--judge", f"python:{(arguments.folder / 'judge.py').resolve()}:long"]
    one = run_command([program, "asr", str(aligned), *common, *judge], repeat=arguments.repeat).seconds
    print(f"one evaluation, whole program: {one:.1f} s", flush=True)
    search = run_command([program, "search", str(base), str(aligned), "--ranks", RANKS, *common, *judge], repeat=arguments.repeat).seconds
    ratio = search / (7 * one)
    print(f"search over 7 ranks: {search:.1f} s, {ratio:.2f} of seven evaluations ({search / (8 * one):.2f} of eight, the aligned model's counted)")
    print(json.dumps({"size": arguments.size, "prompts": arguments.prompts, "evaluation": one, "search": search, "of_seven": ratio}))


if __name__ == "__main__":
    main()
