"""The contract with agents, pinned: a line that some agent of wire version 2 wrote stays readable."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from worker_agent import wire

SAMPLES = Path(__file__).parent / "samples" / "v2"


def line(name: str) -> bytes:
    return (SAMPLES / f"{name}.json").read_bytes()


def test_a_report_is_written_as_the_sample_says():
    sample = line("report_of_many_models")
    assert orjson.loads(wire.Report.from_line(sample).to_line()) == orjson.loads(sample)


def test_one_that_says_nothing_of_going_on_with_answers_is_not_asked_to():
    [model] = wire.Report.from_line(line("report")).models
    assert not model.continues
    [model] = wire.Report.from_line(line("report_of_one_that_continues")).models
    assert model.continues


def test_one_that_says_nothing_of_loading_has_its_models_loaded():
    [model] = wire.Report.from_line(line("report")).models
    assert model.state is wire.ModelState.LOADED


def test_a_report_tells_of_each_model_what_it_is_and_how_much_it_holds():
    [model] = wire.Report.from_line(line("report")).models
    assert model.identity == "Qwen2.5-7B-Instruct-Q4_K_M.gguf"
    assert (model.memory_tokens, model.cache_tokens) == (32768, 42130)


def test_an_agent_from_before_identities_is_understood():
    [model] = wire.Report.from_line(line("report_before_identities")).models
    assert (model.identity, model.memory_tokens, model.cache_tokens) == ("", None, None)


def test_what_a_newer_agent_tells_besides_is_ignored():
    report = wire.Report.from_line(line("report_of_a_newer_agent"))
    assert (report.state, report.models[0].name) == (wire.EngineState.STARTING, "chat")


@pytest.mark.parametrize(
    "model",
    [
        {"name": "m", "identity": "a\nb"},
        {"name": "m", "identity": "x" * 401},
        {"name": "m", "memory_tokens": 0},
        {"name": "m", "cache_tokens": wire.MAX_TOKENS_HELD + 1},
    ],
)
def test_what_no_agent_should_claim_is_refused(model):
    report = orjson.loads(line("report")) | {"models": [model]}
    with pytest.raises(wire.WireError):
        wire.Report.from_line(orjson.dumps(report))


def test_every_sample_is_read():
    here = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in here for path in SAMPLES.glob("*.json"))
