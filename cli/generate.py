"""`limbeck generate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import checked, json_option

if TYPE_CHECKING:
    from ..recipes.generating import Generated, LanguageProgram

EXAMPLES = """
\b
Examples:
  limbeck generate artifact --prompt "It was a dark and stormy night"
  limbeck generate artifact --prompt "Dear Sir" --temperature 0.8 --top-p 0.9 --seed 7
  limbeck generate ./model --prompt "Once" --prompt "One morning" --max-new-tokens 40 --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("subject")
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="Repeatable: one batch.")
@click.option("--max-new-tokens", type=int, help="[default: 256, or what the program has room for]")
@click.option("--temperature", type=float, help="0 takes the likeliest token, more samples.  [default: 0]")
@click.option("--top-k", type=int, help="Sample among so many tokens.")
@click.option("--top-p", type=float, help="Sample among the tokens that hold this share of the probability.")
@click.option("--seed", type=int, help="Of the sampling.  [default: 0]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the runtime.  [default: all]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model ships. Off by default.")
@json_option
def command(
    subject: str, prompts: tuple[str, ...], threads: int | None, trust_remote_code: bool, as_json: bool,
    **settings: object,
) -> None:  # fmt: skip
    """Write on after a prompt with SUBJECT (an artifact, or a checkpoint in eager torch).

    The text of one prompt appears as it is written. How long it took is said at the end, on standard error.
    """
    from ..backends.writing import WritingSettings
    from .console import print_json, show_text, working

    wanted = checked(WritingSettings, settings)
    with working() as progress:
        progress.say("loading")
        from ..recipes.generating import LanguageProgram, generate

        program = LanguageProgram.open(subject, threads, trust_remote_code)
        program.writer()  # what cannot write says so before anything is shown
    streams = len(prompts) == 1 and not as_json
    found = generate(program, prompts, wanted, show_text if streams else None)
    if as_json:
        print_json(asdict(found))
        return
    show_text("\n" if streams else "".join(f"{text.prompt}{text.text}\n\n" for text in found.continuations))
    _tell(found, program)


def _tell(found: Generated, program: LanguageProgram) -> None:
    from .console import done

    count = sum(text.tokens for text in found.continuations)
    speed = "" if found.tokens_per_second is None else f", then {found.tokens_per_second:.1f} tokens a second"
    kept = found.cache_bytes / 2**20
    done(f"{count} tokens: the first after {found.first_token_ms:.0f} ms{speed}; the cache holds {kept:.1f} MiB.")
    if program.tokenizer.eos_token_id is None:
        done("The tokenizer has no end token, so nothing but --max-new-tokens ends a text.")
