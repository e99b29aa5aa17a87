"""One of several processes of a small model: `python -m tests.glm_jax.one_of_several COORDINATOR N I [die]`.

Knows no server. Process 0 prints the answers as JSON; with "die", the last process ends in the middle.
"""

from __future__ import annotations

import json
import os
import sys

import jax

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.processes import Followers, Leader, LeadingRunner, Member, join
from glm_jax.runner import Runner

PROMPTS = {"a": (3, 1, 4, 1, 5), "b": (2, 7, 1, 8, 2, 8, 1, 8, 2, 8), "c": (9,)}


def requests() -> list[Request]:
    """What is asked: greedy and not, with biases, and with scores of the prompt."""
    drawn = {"a": {}, "b": {"temperature": 1.0, "seed": 5}, "c": {"logit_bias": ((7, 5.0),)}}
    scored = {"b": {"num_prompt_logprobs": 2}}
    return [
        Request(
            id=id,
            prompt=prompt,
            sampling=SamplingParams(
                **{"max_new_tokens": 6, "temperature": 0.0, **drawn[id], **scored.get(id, {})}
            ),
        )
        for id, prompt in PROMPTS.items()
    ]


def answers(engine: Engine) -> dict[str, list[object]]:
    """Tokens, log-probabilities and scores, as JSON has them."""
    told: dict[str, list[object]] = {id: [] for id in PROMPTS}

    def deliver(events: list[TokenEvent]) -> None:
        for event in events:
            scores = [[each.logprob, each.rank] for each in event.prompt_logprobs]
            told[event.request_id].append([event.token, event.logprob, scores])

    for request in requests():
        engine.submit(request)
    engine.stop()
    engine.run(deliver)
    return told


def main(coordinator: str, num_processes: int, process_id: int, *how: str) -> None:
    # Here, for the module of the tests is read before JAX knows of the other processes.
    from tests.engine.test_real_schedules import LEAN, make_runner

    member = Member(coordinator, num_processes, process_id)
    join(member)
    if process_id:
        leader = Leader(member)
        shapes = leader.begun("tiny")
        runner = make_runner(len(jax.devices()), shapes)
        leader.follow(dying_after(runner, 3) if how else runner)
        return
    followers = Followers(member)
    followers.begin(LEAN, "tiny")
    runner = LeadingRunner(make_runner(len(jax.devices()), LEAN), followers)
    print(json.dumps(answers(Engine(runner, LEAN, 8))))


def dying_after(runner: Runner, num_steps: int) -> Runner:
    """A runner whose process is gone after so many steps."""
    dispatch, left = runner.dispatch, [num_steps]

    def until_the_end(phase, batch):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return dispatch(phase, batch)

    runner.dispatch = until_the_end
    return runner


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
