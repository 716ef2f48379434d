"""What is known of every worker's models, and where a model is to be loaded or fetched."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import (
    Condition,
    Endpoint,
    Gone,
    Lost,
    ModelName,
    ModelOffer,
    Reported,
    Seen,
    Worker,
    WorkerId,
)
from balancer.fleet_models import Holding, Stock, best_for_load, speaks_of
from balancer.watch import from_report
from worker_agent.wire import EngineState, ModelState, Report, ServedModel


def worker(name: str, type: str = "openai", **more: object) -> Worker:
    return Worker(id=WorkerId(name), type=type, url=f"http://{name}:1", **more)


def offer(name: str, **more: object) -> ModelOffer:
    return ModelOffer(name=ModelName(name), **more)


def stock_of(worker: Worker, *offers: ModelOffer) -> Stock:
    stock = Stock()
    stock.notice(Seen(worker))
    stock.notice(Reported(worker.id, Condition(models=offers)))
    return stock


def reported(stock: Stock, agent: str, *models: ServedModel, **more: object) -> None:
    report = Report(id=agent, state=EngineState.READY, engine="llama.cpp", slots=1, models=models, **more)
    stock.heard(report)
    stock.notice(Reported(WorkerId(agent), from_report(report)))


def names(stock: Stock) -> dict[str, tuple[str, ...]]:
    return {one.name: one.names for one in stock.holdings()}


def test_what_an_agent_reports_is_known_with_all_it_says():
    stock = Stock()
    stock.notice(Seen(worker("a", "agent")))
    model = ServedModel(
        name="m", state=ModelState.LOADING, progress=0.5, eta_seconds=4.0, size_bytes=5, memory_bytes=7
    )
    reported(stock, "a", model, memory_total_bytes=100, memory_held_bytes=30)
    (held,) = stock.holdings()
    assert (held.worker, held.name, held.state, held.engine) == ("a", "m", ModelState.LOADING, "llama.cpp")
    assert (held.progress, held.eta_seconds, held.size_bytes, held.memory_bytes) == (0.5, 4.0, 5, 7)
    assert stock.free_bytes(WorkerId("a")) == 70


@pytest.mark.parametrize(
    ("offered", "state"),
    [
        (offer("m"), ModelState.LOADED),
        (offer("m", loaded=False), ModelState.UNLOADED),
        (offer("m", loaded=False, loading=True), ModelState.LOADING),
        (offer("m", failed="too large"), ModelState.FAILED),
    ],
)
def test_what_others_tell_is_known_as_far_as_it_goes(offered: ModelOffer, state: ModelState):
    (held,) = stock_of(worker("a"), offered).holdings()
    assert held.state is state
    assert held.detail == (offered.failed or "")


def test_a_model_is_found_by_all_its_names_and_listed_under_those_that_people_gave():
    aliased = worker("a", "ollama", aliases=((ModelName("qwen"), ModelName("qwen2.5")),))
    stock = stock_of(
        aliased,
        offer("qwen2.5:latest"),
        offer("qwen2.5", known_as=ModelName("qwen2.5:latest")),
        offer("qwen2.5-7b q4_k_m", known_as=ModelName("qwen2.5:latest"), automatic=True),
    )
    assert names(stock) == {"qwen2.5:latest": ("qwen2.5:latest", "qwen2.5", "qwen")}
    for name in ("qwen", "qwen2.5", "qwen2.5:latest", "qwen2.5-7b q4_k_m"):
        assert stock.own_name(WorkerId("a"), name) == "qwen2.5:latest"
    assert stock.own_name(WorkerId("a"), "qwen3") is None


def test_what_a_lost_worker_had_is_not_counted_on():
    stock = stock_of(worker("a"), offer("m"))
    stock.notice(Lost(WorkerId("a"), "silent"))
    assert not stock.holdings()
    assert not stock.answers(WorkerId("a"))
    assert WorkerId("a") in stock.workers
    stock.notice(Gone(WorkerId("a")))
    assert not stock.workers


def test_a_worker_at_another_address_is_not_taken_to_have_what_the_last_one_had():
    stock = stock_of(worker("a"), offer("m"))
    stock.notice(Seen(Worker(id=WorkerId("a"), type="openai", url="http://elsewhere:1")))
    assert not stock.holdings()


def test_a_report_of_nobody_we_know_is_not_kept():
    stock = Stock()
    reported(stock, "stranger", ServedModel(name="m"))
    assert not stock.holdings()
    assert not stock.workers


def test_a_model_that_only_embeds_is_told_from_one_that_writes():
    stock = stock_of(worker("a"), offer("e", endpoints=frozenset({Endpoint.EMBEDDINGS})), offer("m"))
    assert stock.embeds_only(WorkerId("a"), "e")
    assert not stock.embeds_only(WorkerId("a"), "m")
    assert not stock.embeds_only(WorkerId("b"), "e")


# Where to ...


def held(name: str, state: ModelState = ModelState.UNLOADED) -> Holding:
    return Holding(worker=WorkerId(name), name="m", names=("m",), state=state)


def best(free: Mapping[str, int | None], *holdings: Holding) -> str | None:
    chosen = best_for_load(holdings, lambda worker: free.get(worker))
    return chosen.worker if chosen else None


def test_a_model_is_loaded_where_most_memory_is_free():
    assert best({"a": 5, "b": 9, "c": 7}, held("a"), held("b"), held("c")) == "b"


def test_who_does_not_tell_its_memory_comes_last_and_who_failed_even_later():
    assert best({"a": 1}, held("b"), held("a")) == "a"
    assert best({"a": 9}, held("b"), held("a", ModelState.FAILED)) == "b"
    assert best({"a": 9}, held("a", ModelState.FAILED)) == "a"


@pytest.mark.parametrize("state", [ModelState.LOADED, ModelState.LOADING])
def test_where_it_is_loaded_already_there_is_nothing_to_load(state):
    assert best({"a": 9}, held("a", state)) is None


@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.sampled_from(ModelState), st.none() | st.integers(-5, 5))
    )
)
def test_nobody_who_has_more_room_is_passed_over(room):
    holdings = [held(name, state) for name, (state, _) in room.items()]
    free = {name: bytes_ for name, (_, bytes_) in room.items()}
    chosen = best(free, *holdings)
    loadable = {name for name, (state, _) in room.items() if state is ModelState.UNLOADED}
    if loadable:
        assert chosen in loadable
        told = [free[name] for name in loadable if free[name] is not None]
        if told:
            assert free[chosen] == max(told)
    else:
        assert (chosen is not None) == any(state is ModelState.FAILED for state, _ in room.values())


@pytest.mark.parametrize(
    ("repo", "kind"),
    [
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "agent"),
        ("TheBloke/x.y_z-GGUF", "agent"),
        ("llama3.2", "ollama"),
        ("llama3.2:1b", "ollama"),
        ("hf.co/org/model:Q4_K_M", "ollama"),
        ("me/mine:latest", "ollama"),
    ],
)
def test_a_name_says_who_can_fetch_it(repo, kind):
    assert speaks_of(repo) == kind
