"""Models that are not loaded: who is asked, who waits, and what their silence says."""

import random
from dataclasses import replace

import pytest

from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.dispatcher import HedgePolicy
from balancer.core.fleet import Fleet
from balancer.core.loads import Load, learned
from balancer.core.model import (
    Condition,
    Ended,
    Endpoint,
    Loading,
    ModelName,
    ModelOffer,
    Needs,
    Refusal,
    Refuse,
    Reported,
    Seen,
    Ticket,
    Verdict,
    WorkerId,
)
from balancer.core.placement import POLICIES
from tests.core.rooms import (
    M,
    Room,
    abandoned,
    granted,
    grants,
    llama_cpp,
    paper,
    probes,
    refused,
    worker,
)

every_policy = pytest.mark.parametrize("policy", POLICIES)
scoring = pytest.mark.parametrize(
    "policy", [name for name, policy in POLICIES.items() if not policy.estimates]
)
OTHER = ModelName("n")


def unloaded(seconds: float, like: Condition | None = None, **more) -> Condition:
    """An agent's worker that has model m on its disk."""
    like = like or llama_cpp()
    offers = tuple(replace(one, loaded=False, load_seconds=seconds, **more) for one in like.models)
    return replace(like, models=offers, tells_loads=True)


def loading(seconds: float, progress: float | None = None, like: Condition | None = None) -> Condition:
    return unloaded(seconds, like, loading=True, progress=progress)


def loaded(like: Condition | None = None) -> Condition:
    return replace(like or llama_cpp(), tells_loads=True)


def warm_and_cold(policy: str = "expected_latency", seconds: float = 60.0, slots: int = 1) -> Room:
    """Two equal machines; one has the model loaded. An answer takes about 5 s."""
    room = Room(policy)
    room.add("cold", loaded(llama_cpp(slots=slots)))
    room.add("warm", loaded(llama_cpp(slots=slots)))
    for name in ("cold", "warm"):
        room.teach(name, prefill=1000, token=0.05)
    room.report("cold", unloaded(seconds, llama_cpp(slots=slots)))
    return room


# Who is asked


@every_policy
def test_whoever_has_the_model_is_asked_and_nobody_loads_it(policy):
    room = warm_and_cold(policy)
    for number in range(1, 20):
        assert granted(room.ask(number, tokens=100)) == [(number, "warm")]
        room.end(number, Verdict.UNKNOWN)


@every_policy
def test_a_short_wait_is_waited(policy):
    room = warm_and_cold(policy)
    for number in (1, 2, 3):
        room.ask(number, tokens=100, max_output=100)
    assert room.waiting == 2
    assert granted(room.ticks(5)) == []
    assert granted(room.end(1)) == [(2, "warm")]


def test_a_line_that_takes_longer_than_the_load_has_the_model_loaded_once_more():
    room = warm_and_cold(seconds=20)
    where = dict(granted([one for number in range(1, 41) for one in room.ask(number, tokens=100)]))
    assert where.pop(1) == "warm"
    assert list(where.values()) == ["cold"]
    (first,) = where
    assert first > 10, "those before it are served sooner by who has the model"


def test_one_load_at_a_time_while_it_ends_the_line():
    room = Room()
    for name in ("a", "b", "c", "warm"):
        room.add(name, loaded(llama_cpp(slots=2)))
        room.teach(name, prefill=1000, token=0.05)
    for name in ("a", "b", "c"):
        room.report(name, unloaded(20, llama_cpp(slots=2)))
    asked: set[str] = set()
    for number in range(1, 101):
        asked |= {name for _, name in granted(room.ask(number, tokens=100))}
    assert len(asked) == 2, "with a second worker the rest of the line is not longer than a load"


@every_policy
def test_where_nobody_has_it_one_loads_it_and_the_others_wait_for_that(policy):
    room = Room(policy)
    for name in "abc":
        room.add(name, unloaded(60, llama_cpp(slots=2)))
    ((_, first),) = granted(room.ask(1, tokens=100))
    assert granted(room.ask(2, tokens=100)) == [(2, first)]
    assert granted(room.ask(3, tokens=100)) == []
    room.report(first, loading(55, 0.1, llama_cpp(slots=2)))
    assert granted(room.ticks(5)) == []
    assert room.waiting == 1


@every_policy
def test_a_model_that_is_being_loaded_is_waited_for(policy):
    room = Room(policy)
    room.add("idle", unloaded(60))
    room.add("busy", loading(55))
    for number in range(1, 5):
        assert granted(room.ask(number, tokens=100)) == [(number, "busy")]


def test_a_much_faster_load_elsewhere_is_begun():
    room = Room()
    room.add("slow", loading(300))
    room.add("fast", unloaded(10))
    assert granted(room.ask(1, tokens=100)) == [(1, "fast")]


@scoring
def test_scores_never_send_to_who_has_not_the_model_while_somebody_has(policy):
    room = warm_and_cold(policy)
    for number in range(1, 40):
        room.ask(number, tokens=100)
    assert room.view("cold").running == 0
    assert granted(room.report("warm", replace(loaded(), ready=False, state="failed")))[0][1] == "cold"


def test_the_home_of_a_conversation_that_has_unloaded_the_model_is_no_home():
    room = Room()
    for name in ("home", "other"):
        room.add(name, loaded())
        room.teach(name, prefill=1000, token=0.05)
    ((_, where),) = granted(room.ask(1, tokens=200, conversation=1, avoid=["other"]))
    room.begin(1, 0.2)
    room.end(1, prompt=200, output=10)
    assert where == "home"
    room.report("home", unloaded(10))
    assert granted(room.ask(2, tokens=300, continues=1, conversation=2)) == [(2, "other")]


def test_a_worker_is_not_made_to_load_a_model_to_learn_how_fast_it_is():
    room = Room()
    room.add("known", loaded())
    room.teach("known", prefill=1000, token=0.05)
    room.add("new", unloaded(5))
    for number in range(1, 10):
        assert granted(room.ask(number, tokens=10)) == [(number, "known")]
        room.end(number, Verdict.UNKNOWN)


def test_slots_of_one_model_are_fewer_than_its_machines():
    room = Room()
    offers = ModelOffer(name=M, slots=1), ModelOffer(name=OTHER)
    room.add("a", Condition(models=offers, slots=3, tells_loads=True))
    assert granted(room.ask(1)) == [(1, "a")]
    assert granted(room.ask(2)) == []
    assert granted(room.ask(3, model="n")) == [(3, "a")]
    assert granted(room.end(1)) == [(2, "a")]


@every_policy
def test_so_it_is_for_a_batch(policy):
    room = Room(policy)
    offers = ModelOffer(name=M, slots=1), ModelOffer(name=OTHER)
    room.add("a", Condition(models=offers, slots=3, tells_loads=True))
    assert len(granted([one for n in (1, 2) for one in room.ask(n, blocks=paper(n, 2), batch=True)])) == 1
    assert granted(room.end(1))[0][0] == 2


# Batches


def test_a_small_batch_stays_where_the_model_is():
    room = warm_and_cold(seconds=60, slots=4)
    commands = [
        one for n in range(1, 4) for one in room.ask(n, blocks=paper(n, 8), batch=True, max_output=20)
    ]
    assert {name for _, name in granted(commands + room.ticks(3))} == {"warm"}


def test_a_large_batch_has_it_loaded_elsewhere_too_by_one_prompt():
    room = warm_and_cold(seconds=60, slots=4)
    commands = []
    for number in range(1, 200):
        commands += room.ask(number, blocks=paper(number, 40), batch=True, max_output=200)
    commands += room.ticks(5)
    assert [name for _, name in granted(commands)].count("cold") == 1, "the others wait where they are free"


def test_what_was_remembered_goes_with_the_model():
    """The second prompt of a paper is not kept for a home that has forgotten it."""
    room = warm_and_cold(slots=4)
    room.report("cold", loaded())
    pages = paper(1, 20)
    ((_, home),) = granted(room.ask(1, blocks=pages, batch=True))
    other = {"warm": "cold", "cold": "warm"}[home]
    room.begin(1, 1.0)
    room.end(1, prompt=20 * 256, output=50, cached=0)
    room.report(home, unloaded(60))
    assert granted(room.ask(2, blocks=pages, batch=True)) == [(2, other)]


# Those who cannot wait so long


def told_to_come_back(room: Room, number: int, name: str, seconds: float) -> list:
    """The agent refuses, and begins to load."""
    told = Loading(WorkerId(name), 0.0, seconds)
    return room.tell(Ended(Ticket(number), Verdict.UNKNOWN, loading=told))


@every_policy
def test_who_cannot_wait_for_the_load_has_it_begun_and_is_told_when_to_come_again(policy):
    room = Room(policy)
    room.add("a", unloaded(200))
    room.add("b", unloaded(200))
    ((_, name),) = granted(room.ask(1, patience=120))
    told_to_come_back(room, 1, name, 200.0)
    (refuse,) = room.ask(2, patience=120, admitted=True)
    assert isinstance(refuse, Refuse)
    assert refuse.refusal is Refusal.MODEL_LOADING
    assert refuse.loading == Loading(WorkerId(name), 0.0, 200.0)
    assert refuse.retry_after == 200.0
    assert room.view("a").running + room.view("b").running == 0, "nobody else has begun to load it"


@every_policy
def test_who_comes_meanwhile_and_cannot_wait_is_told_so_at_once(policy):
    room = Room(policy)
    room.add("a", loading(200, 0.25))
    (refuse,) = room.ask(1, patience=120)
    assert (refuse.refusal, refuse.loading.progress) == (Refusal.MODEL_LOADING, 0.25)
    assert granted(room.ask(2, patience=300)) == [(2, "a")]


@every_policy
def test_the_word_of_the_worker_counts_until_its_reports_say_more(policy):
    room = Room(policy)
    room.add("a", unloaded(100))
    room.ask(1, patience=60)
    told_to_come_back(room, 1, "a", 100.0)
    room.report("a", unloaded(100))
    assert refused(room.ask(2, patience=60)) == [Refusal.MODEL_LOADING]
    room.report("a", loaded())
    assert granted(room.ask(3, patience=60)) == [(3, "a")]


@every_policy
def test_who_waits_behind_others_is_told_as_soon_as_it_is_clear(policy):
    room = Room(policy)
    room.add("a", loading(10, like=llama_cpp(slots=1)))
    assert granted(room.ask(1, patience=50)) == [(1, "a")]
    assert room.ask(2, patience=50) == []
    room.report("a", loading(90, like=llama_cpp(slots=1)))
    assert refused(room.tick(1.0)) == [Refusal.MODEL_LOADING]


@every_policy
def test_who_would_be_in_time_elsewhere_has_it_loaded_there(policy):
    room = Room(policy)
    room.add("slow", loading(130))
    room.add("other", unloaded(110))
    assert granted(room.ask(1, patience=120)) == [(1, "other")]


@every_policy
def test_who_waits_is_told_how_far_the_model_is(policy):
    room = Room(policy)
    room.add("a", loading(40, 0.2, llama_cpp(slots=1)))
    room.ask(1)
    room.ask(2)
    room.now += 10
    room.report("a", loading(30, 0.4, llama_cpp(slots=1)))
    expected = Loading(WorkerId("a"), 0.4, 30.0)
    assert room.dispatcher.loading(Ticket(1), room.now) == expected
    assert room.dispatcher.standing(Ticket(2), room.now).loading == expected
    room.report("a", loaded(llama_cpp(slots=1)))
    assert room.dispatcher.loading(Ticket(1), room.now) is None
    assert room.dispatcher.standing(Ticket(2), room.now).loading is None


# Silence


def test_who_waits_for_a_model_is_rightly_told_nothing():
    room = Room(hedge=HedgePolicy())
    room.add("a", loaded())
    room.teach("a", prefill=1000, token=0.05)
    room.report("a", unloaded(60))
    room.ask(1, tokens=100)
    for left in range(60, 0, -1):
        room.now += 1
        room.report("a", loading(left))
        assert abandoned(room.tick()) == []
    room.report("a", loaded())
    assert abandoned(room.ticks(5)) == [], "it has only just begun to read"
    assert set(abandoned(room.ticks(30))) == {1}


def test_the_load_is_not_taken_for_slow_reading():
    room = Room()
    room.add("a", loaded())
    room.teach("a", prefill=1000, token=0.05)
    before = room.view("a")
    room.report("a", unloaded(60))
    room.ask(1, tokens=1000)
    room.report("a", loading(60))
    room.now += 60
    room.report("a", loaded())
    room.begin(1, 1.0)
    room.end(1, after=5.0, seconds=66.0, prompt=1000, output=101, cached=0)
    after = room.view("a")
    assert after.prefill_tokens_per_second == before.prefill_tokens_per_second
    assert after.average_seconds == pytest.approx(2.0), "four of 1 s, and 6 s of what was no load"


def test_how_long_a_load_takes_is_learned_where_nobody_tells():
    """Ollama says what it has loaded, and nothing of how it goes."""
    room = Room()
    guess = replace(unloaded(3), tells_loads=False)
    room.add("a", replace(llama_cpp(), tells_loads=False))
    room.teach("a", prefill=1000, token=0.05)
    room.report("a", guess)
    room.ask(1, tokens=100)
    assert room.dispatcher.loading(Ticket(1), room.now).eta_seconds == pytest.approx(3)
    room.begin(1, 40.0)
    assert room.dispatcher.loading(Ticket(1), room.now) is None
    room.report("a", guess)  # what a probe saw a moment ago; tokens come, so it is loaded
    room.end(1, seconds=41.0)
    room.report("a", guess)
    room.ask(2, tokens=100)
    assert room.dispatcher.loading(Ticket(2), room.now).eta_seconds == pytest.approx(40, rel=0.05)


def test_a_measured_load_is_bounded_and_smoothed():
    assert learned(None, 40.0) == 40.0
    assert learned(40.0, 20.0) == 30.0
    assert learned(None, 1e9) == 3600.0
    assert learned(None, -5.0) == 0.5


def test_a_chat_that_waits_for_a_load_is_copied_to_who_has_the_model_and_nothing_to_do():
    room = Room(hedge=HedgePolicy(share=1.0))
    room.add("cold", unloaded(60))
    assert granted(room.ask(1, tokens=100)) == [(1, "cold")]
    room.add("warm", loaded())
    (copy,) = grants(room.tick(0.25))
    assert (copy.worker.id, copy.copy_of) == ("warm", 1)
    assert copy.choice.because == "cold has yet to load the model"


def test_a_model_that_is_there_in_a_moment_is_not_fled_from():
    room = Room(hedge=HedgePolicy(share=1.0))
    room.add("cold", loading(0.1))
    assert granted(room.ask(1, tokens=100)) == [(1, "cold")]
    room.add("warm", loaded())
    assert grants(room.tick()) == []


# Who cannot


@every_policy
def test_who_cannot_load_it_is_not_asked_for_it(policy):
    room = Room(policy)
    other = ModelOffer(name=OTHER)
    broken = ModelOffer(name=M, loaded=False, failed="9.3 GiB are needed, 6.0 are free")
    room.add("a", Condition(models=(broken, other), slots=4, tells_loads=True))
    room.add("b", loaded())
    for number in range(1, 5):
        (grant,) = grants(room.ask(number))
        assert grant.worker.id == "b"
        assert grant.choice.excluded["a"] == "9.3 GiB are needed, 6.0 are free"
    assert granted(room.ask(9, model="n")) == [(9, "a")]


@every_policy
def test_where_nobody_can_load_it_that_is_said_at_once_and_why(policy):
    room = Room(policy)
    room.add("a", unloaded(5, failed="9.3 GiB are needed, 6.0 are free"))
    (refuse,) = room.ask(1)
    assert (refuse.refusal, refuse.detail) == (Refusal.MODEL_FAILED, "a: 9.3 GiB are needed, 6.0 are free")
    assert room.dispatcher.serves(M)
    room.add("b", loaded(llama_cpp(slots=1)))
    assert granted(room.ask(2)) == [(2, "b")]
    assert room.ask(3) == []
    assert refused(room.report("b", unloaded(5, failed="its file is gone"))) == [Refusal.MODEL_FAILED]


# Requests of our own


def test_a_model_that_was_loaded_for_somebody_is_measured_when_they_are_through():
    room = Room()
    cold, warm = (replace(one, calibrates=True) for one in (unloaded(5), loaded()))
    assert probes(room.add("a", cold)) == []
    room.ask(1)
    assert probes(room.report("a", warm)) == []
    room.begin(1)
    room.end(1, Verdict.UNKNOWN)
    assert [probe.measures for probe in probes(room.report("a", warm))] == [True]


def test_a_tripped_worker_is_tried_with_what_it_has_loaded():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    offers = (
        ModelOffer(name=M, loaded=False, load_seconds=60),
        ModelOffer(name=OTHER),
    )
    room.add("a", Condition(models=offers, slots=4, tells_loads=True))
    room.ask(1)
    room.end(1, Verdict.BAD)
    assert [probe.model for probe in probes(room.tick(11))] == ["n"]


def test_a_tripped_worker_that_loads_its_only_model_is_not_asked_again_and_again():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("a", unloaded(60))
    room.ask(1)
    room.end(1, Verdict.BAD)
    room.report("a", unloaded(60))
    (probe,) = probes(room.tick(11))
    told_to_come_back(room, probe.ticket, "a", 60.0)
    assert probes(room.ticks(20)) == []
    room.report("a", loaded())
    assert len(probes(room.tick(0.25))) == 1


# Reports come twenty times a second while a model is loaded


def test_a_report_that_says_what_was_expected_changes_nothing():
    fleet = Fleet(BreakerPolicy())
    fleet.seen(worker("a"))
    fleet.reported(WorkerId("a"), loading(60, 0.0), 0.0)
    member = fleet.get(WorkerId("a"))
    needs = Needs(model=M, endpoint=Endpoint.CHAT)
    changes, version = member.changes, fleet.version
    chance = random.Random(1)
    for step in range(1, 1000):
        now = step * 0.05
        left = 60 - now + chance.uniform(-0.2, 0.2)
        assert not fleet.reported(WorkerId("a"), loading(left, now / 60), now)
        told = fleet.loading(needs, now)
        assert told.eta_seconds == pytest.approx(60 - now, abs=0.7)
        assert told.progress == now / 60
    assert (member.changes, fleet.version) == (changes, version)
    assert fleet.reported(WorkerId("a"), loaded(), 50.0)
    assert fleet.loading(needs, 50.0) is None


def test_a_load_that_is_late_is_expected_to_take_as_long_again_as_it_is_late():
    load = Load(10.0)
    assert load.wait(0.0) == 10.0
    load.expect(10.0, 0.0)
    assert (load.wait(4.0), load.wait(25.0)) == (6.0, 15.0)


def test_a_worker_that_has_moved_still_loads():
    room = Room()
    room.add("a", unloaded(30))
    room.ask(1)
    room.tell(Seen(worker("a", port=2)))
    assert room.dispatcher.loading(Ticket(1), room.now).worker_id == "a"
    room.tell(Reported(WorkerId("a"), loaded()))
    room.begin(1)
    room.end(1)
    assert room.view("a").running == 0


def test_a_prompt_whose_model_is_swapped_out_before_it_is_read_waits_for_it_anew():
    room = Room()
    room.add("a", loaded())
    room.teach("a", prefill=1000, token=0.05)
    room.ask(1, tokens=100)
    room.report("a", unloaded(60))
    assert abandoned(room.ticks(50)) == []
    assert room.dispatcher.loading(Ticket(1), room.now) is not None


def test_while_people_chat_a_long_prompt_is_sliced_for_who_has_yet_to_load_the_model_too():
    room = Room(batch=BatchPolicy(slice_seconds=0.5))
    room.add("a", unloaded(20, llama_cpp(slots=4)))
    room.ask(1, tokens=50)
    (grant,) = grants(room.ask(2, blocks=paper(1, 40), batch=True))
    assert grant.warm_chars is not None
    assert granted(room.ask(3, blocks=paper(2, 40), batch=True)) == [], "one is read at a time, and so waits"


# An engine beside one that is being loaded


def beside_a_load() -> Room:
    """A machine that writes an answer of model m, its first token just come, while it loads model n."""
    room = Room()
    both = ModelOffer(name=M), ModelOffer(name=OTHER, loaded=False, loading=True, load_seconds=100)
    room.add("only", replace(loaded(), models=both))
    room.teach("only", prefill=1000, token=0.02)
    room.ask(1)
    room.begin(1, after=1.0)
    return room


def test_an_engine_may_be_silent_for_longer_while_its_machine_loads_another_model():
    room = beside_a_load()
    assert abandoned(room.ticks(15)) == []
    assert set(abandoned(room.ticks(15))) == {1}
    assert room.view("only").stuck


def test_who_waits_for_a_load_is_not_abandoned_over_another_engine_of_the_machine():
    room = beside_a_load()
    assert granted(room.ask(2, model="n")) == [(2, "only")]
    assert set(abandoned(room.ticks(30))) == {1}
