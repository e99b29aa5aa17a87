"""The environment of a process on GPUs: what is set, and that the user's word stays."""

import pytest

from glm_jax.environment import MEMORY_SHARE, SETTINGS, missing, prepare


def test_an_empty_environment_gets_everything() -> None:
    environ: dict[str, str] = {}
    assert prepare(environ) == environ
    assert set(environ) == {setting.names[0] for setting in SETTINGS}
    assert float(environ["XLA_CLIENT_MEM_FRACTION"]) == MEMORY_SHARE
    assert prepare(environ) == {}


@pytest.mark.parametrize("name", [name for setting in SETTINGS for name in setting.names])
def test_what_the_user_has_set_stays_under_any_of_its_names(name: str) -> None:
    environ = {name: "theirs"}
    added = prepare(environ)
    assert environ[name] == "theirs"
    assert added == missing({name: "theirs"}) and len(added) == len(SETTINGS) - 1
