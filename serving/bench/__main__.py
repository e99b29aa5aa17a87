"""The command line: load on a server, and `startup`, `frontend`, `decode`, `page`; flags, files, exit code.

Knows no measurement from inside, and imports one when it is asked for, so that --help is there at once.

Exit codes: 0, all requests were answered whole; 1, some were not; 2, the command line is wrong; 3,
the server could not be reached, was given up, or does not start; 130, interrupted.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from glm_jax.command_line import Group
from serving.bench.commands import decode_command, frontend_command, page_command, startup_command
from serving.bench.options import load_flags

_EXAMPLES = (
    ("The server on port 5000.", "python -m serving.bench"),
    (
        "A sweep over a server of its own, with a picture.",
        "python -m serving.bench --model-dir checkpoints/nano --concurrency 1,4,16,32 --plot sweep.svg",
    ),
    (
        "Requests that arrive in bursts, and how many are answered fast enough.",
        "python -m serving.bench --request-rate 8 --burstiness 0.5 --goodput ttft:500 --goodput tpot:50",
    ),
    (
        "Long prompts that begin alike: what the prefix cache saves.",
        "python -m serving.bench --dataset shared-prefix --prefix-len 1024 --prompt-len 1152",
    ),
)


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"max_content_width": 100},
    examples=_EXAMPLES,
)
@load_flags
@click.pass_context
def main(context: click.Context, **flags: Any) -> None:
    """Measure a server: throughput and latencies under a load.

    Exits with 0 when all requests were answered whole, 1 when some were not, 2 for a wrong command
    line, 3 when the server cannot be reached, was given up or does not start, 130 when interrupted.
    """
    if context.invoked_subcommand is None:
        from serving.bench.measured import measure

        sys.exit(measure(flags))


for command in (startup_command, frontend_command, decode_command, page_command):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m serving.bench")
