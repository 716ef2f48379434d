"""The default policy, ROUTING 2: who gets an ask when what it will cost is known."""

import pytest

from balancer.core.admission import AdmissionPolicy
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.model import (
    Condition,
    Gone,
    Lost,
    ModelName,
    ModelOffer,
    Tick,
    Ticket,
    Verdict,
    WorkerId,
)
from tests.core.rooms import (
    M,
    Room,
    abandoned,
    condition,
    granted,
    grants,
    llama_cpp,
    old_cpu,
    paper,
    probes,
    vllm,
)


def fast_and_slow(times: float = 5.0, **slots) -> Room:
    """Both known well; alone the fast one reads 1 000 tokens/s and writes 50."""
    room = Room()
    room.add("fast", condition(**slots))
    room.add("slow", condition(**slots))
    room.teach("fast", prefill=1000, token=0.02, answers=10)
    room.teach("slow", prefill=1000 / times, token=0.02 * times, answers=10)
    return room


# Late binding


def test_the_faster_of_two_idle_ones_is_asked():
    room = fast_and_slow()
    assert [granted(room.ask(n, tokens=1000))[0][1] for n in (1, 2)] == ["fast", "fast"]


def test_an_ask_waits_for_the_fast_one_rather_than_going_to_the_slow_one():
    room = fast_and_slow(20, slots=1)
    room.ask(1, tokens=1000)
    assert room.ask(2, tokens=1000) == []
    room.begin(1, after=1.0)
    assert granted(room.end(1, after=5.0)) == [(2, "fast")]


def test_it_goes_to_the_slow_one_where_that_is_not_later():
    room = fast_and_slow(1.5, slots=1)
    room.ask(1, tokens=1000)
    assert granted(room.ask(2, tokens=1000)) == [(2, "slow")]


def test_an_answer_that_takes_ever_longer_is_not_waited_for_without_end():
    room = fast_and_slow(20, slots=1)
    room.ask(1, tokens=1000)
    room.begin(1, after=1.0)
    assert room.ask(2, tokens=1000) == []
    came: list[tuple[int, str]] = []
    for second in range(1, 600):
        room.now += 1
        came += granted(room.tell(Tick({Ticket(1): 50 * second})))
    assert came == [(2, "slow")]


def test_a_machine_that_others_keep_busy_is_not_waited_for_without_end():
    room = fast_and_slow(20, slots=2)
    for _ in range(5):  # one report may lag
        room.report("fast", condition(slots=2, running=9))
    came = granted(room.ask(1, tokens=1000))
    for _ in range(600):
        room.now += 1
        room.report("fast", condition(slots=2, running=9))
        came += granted(room.tick())
    assert came == [(1, "slow")]


def test_a_candidate_tells_what_it_was_expected_to_take():
    room = fast_and_slow(1.2)
    (grant,) = grants(room.ask(1, tokens=1000))
    seconds = {each.worker_id: each.expected_seconds for each in grant.choice.candidates}
    assert seconds["slow"] == pytest.approx(1.2 * seconds["fast"], rel=0.05)


def test_who_is_passed_over_is_named_with_the_reason():
    room = fast_and_slow(20)
    (grant,) = grants(room.ask(1, tokens=1000))
    assert grant.choice.excluded[WorkerId("slow")].startswith("would take ")


def test_prompts_that_wait_to_be_read_are_counted():
    room = fast_and_slow(1.0)
    where = [granted(room.ask(n, tokens=4000))[0][1] for n in (1, 2)]
    assert sorted(where) == ["fast", "slow"]


# Conversations and prefixes


def test_a_conversation_goes_home():
    room = fast_and_slow(3)
    room.ask(1, blocks=paper(1, 4), conversation=10, avoid=["fast"])
    room.begin(1)
    room.end(1, prompt=1000, output=100)
    for number in range(2, 12):
        room.ask(number, blocks=(*paper(1, 4), number), conversation=100 + number, continues=10)
        assert room.view("slow").running == 1, "at home, though the other one is three times faster"
        room.end(number, Verdict.UNKNOWN)


def test_a_conversation_leaves_a_home_that_is_gone():
    room = fast_and_slow(3)
    room.ask(1, blocks=paper(1, 4), conversation=10, avoid=["fast"])
    room.begin(1)
    room.end(1, prompt=1000, output=100)
    room.tell(Lost(WorkerId("slow"), "no report"))
    assert granted(room.ask(2, blocks=paper(1, 4), continues=10)) == [(2, "fast")]


def test_a_conversation_leaves_a_home_that_is_much_too_slow():
    room = fast_and_slow(50)
    room.ask(1, blocks=paper(1, 4), conversation=10, avoid=["fast"])
    room.begin(1)
    room.end(1, prompt=1000, output=100)
    assert granted(room.ask(2, blocks=paper(1, 4), continues=10)) == [(2, "fast")]


@pytest.mark.parametrize(("engine", "cached"), [(vllm, 2560), (llama_cpp, 0)])
def test_a_prefix_in_use_is_shared_only_where_the_engine_can(engine, cached):
    room = Room()
    room.add("a", engine())
    room.ask(1, blocks=paper(1, 10))
    room.begin(1, after=1.0)
    (grant,) = grants(room.ask(2, blocks=paper(1, 10)))
    assert grant.choice.candidates[0].cached_tokens == cached


@pytest.mark.parametrize("engine", [vllm, llama_cpp])
def test_a_prefix_that_was_read_before_is_known(engine):
    room = Room()
    room.add("a", engine())
    room.ask(1, blocks=paper(1, 10))
    room.begin(1, after=1.0)
    room.end(1, prompt=2600, output=10)
    (grant,) = grants(room.ask(2, blocks=paper(1, 10)))
    assert grant.choice.candidates[0].cached_tokens == 2560


def test_an_ask_goes_where_its_long_prefix_is():
    room = fast_and_slow(1.0)
    room.ask(1, blocks=paper(1, 20), avoid=["fast"])
    room.begin(1, after=5)
    room.end(1, prompt=5200, output=10)
    for number in range(2, 8):
        assert granted(room.ask(number, blocks=paper(1, 20))) == [(number, "slow")]
        room.end(number, Verdict.UNKNOWN)


def test_a_machine_that_was_away_remembers_nothing():
    room = Room()
    room.add("a", vllm())
    room.ask(1, blocks=paper(1, 10))
    room.begin(1, after=1.0)
    room.end(1, prompt=2600, output=10)
    room.tell(Lost(WorkerId("a"), "no report"))
    room.report("a", vllm())
    (grant,) = grants(room.ask(2, blocks=paper(1, 10)))
    assert grant.choice.candidates[0].cached_tokens == 0


# Learning


def test_a_machine_that_becomes_five_times_slower_is_noticed_within_a_few_answers():
    room = fast_and_slow(1.0)
    on_slow = 0
    for number in range(1, 60):
        ((_, where),) = granted(room.ask(number, tokens=1000))
        times = 5 if where == "slow" else 1
        on_slow += where == "slow"
        room.begin(number, after=1.0 * times)
        room.end(number, after=2.0 * times, prompt=1000, output=101, cached=0)
    assert on_slow <= 12


def test_a_new_worker_is_tried_with_small_prompts():
    room = fast_and_slow(1.0)
    room.add("new", old_cpu())
    tried = set()
    for number in range(1, 40):
        tried |= {where for _, where in granted(room.ask(number, tokens=500))}
        room.end(number, Verdict.UNKNOWN)
    assert "new" in tried


def test_a_new_worker_of_a_slow_kind_is_not_tried_with_long_prompts():
    room = fast_and_slow(1.0)
    room.add("new", old_cpu())
    for number in range(1, 40):
        ((_, where),) = granted(room.ask(number, tokens=8000))
        assert where != "new"
        room.end(number, Verdict.UNKNOWN)


@pytest.mark.parametrize("output", [4, 100])
def test_a_new_worker_that_turns_out_to_be_slow_is_not_tried_for_ever(output):
    """Short answers are answers too: classification asks for a word."""
    room = fast_and_slow(1.0)
    room.add("new", condition())
    last = ""
    on_new = 0
    for number in range(1, 80):
        ((_, last),) = granted(room.ask(number, tokens=1000, max_output=output))
        times = 10 if last == "new" else 1
        room.begin(number, after=1.0 * times)
        room.end(number, after=0.02 * times * output, prompt=1000, output=output, cached=0)
        on_new += number > 40 and last == "new"
    assert on_new <= 2


def test_a_new_machine_is_measured_once_where_that_costs_nobody_anything():
    room = Room()
    (probe,) = probes(room.add("a", condition(calibrates=True)))
    assert (probe.worker.id, probe.model) == ("a", "m")
    assert probe.prompt_tokens > 256
    assert probes(room.report("a", condition(calibrates=True))) == []
    room.end(probe.ticket, after=1.0, prompt=probe.prompt_tokens, output=probe.output_tokens)
    assert probes(room.report("a", condition(calibrates=True)) + room.ticks(100)) == []


def test_nobody_is_measured_without_having_said_that_it_may_be():
    assert probes(Room().add("a", condition())) == []


def test_a_model_is_not_loaded_to_be_measured():
    offer = ModelOffer(name=M, loaded=False, load_seconds=20)
    assert probes(Room().add("a", Condition(models=(offer,), slots=4, calibrates=True))) == []


def test_a_model_that_must_be_loaded_first_costs_that_time():
    room = fast_and_slow(1.0)
    room.report("slow", Condition(models=(ModelOffer(name=M, loaded=False, load_seconds=60.0),), slots=4))
    for number in range(1, 10):
        assert granted(room.ask(number, tokens=100)) == [(number, "fast")]
        room.end(number, Verdict.UNKNOWN)


# Who failed


def broken_and_well() -> Room:
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("broken", condition(slots=16))
    room.add("well", condition(slots=16))
    room.ask(1, avoid=["well"])
    room.end(1, Verdict.BAD)
    return room


def test_a_tripped_worker_is_tried_with_probes_and_never_with_an_ask():
    room = broken_and_well()
    assert room.view("broken").breaker is Phase.OPEN
    (probe,) = probes(room.tick(10.0))
    assert probe.worker.id == "broken"
    for number in range(2, 12):
        assert granted(room.ask(number)) == [(number, "well")]
    assert probes(room.ticks(5)) == []
    room.end(probe.ticket, Verdict.BAD)
    assert probes(room.ticks(19)) == []
    (probe,) = probes(room.ticks(2))
    room.end(probe.ticket)
    assert room.view("broken").breaker is Phase.CLOSED


def test_a_worker_that_recovered_starts_with_an_eighth_of_its_slots():
    room = broken_and_well()
    (probe,) = probes(room.tick(10.0))
    assert room.view("broken").slots == 2
    room.end(probe.ticket)
    assert room.view("broken").slots == 3
    for number in range(2, 10):
        room.ask(number, avoid=["well"])
        room.end(number)
    assert room.view("broken").slots == 16


def test_a_probe_that_is_never_answered_trips_the_breaker_once():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("hung", condition())
    room.add("well", condition())
    room.teach("hung", prefill=1000, token=0.02)
    room.ask(1, avoid=["well"])
    room.end(1, Verdict.BAD)
    (probe,) = probes(room.tick(10.0))
    room.ticks(120)
    room.end(probe.ticket, Verdict.BAD)
    assert probes(room.ticks(41)), "it rested 10 s, then 20 s; now 40 s at most"


def test_less_is_given_to_who_fails_now_and_then():
    room = Room(breaker=BreakerPolicy(trip_after=99))
    room.add("shaky", condition())
    room.add("well", condition())
    for number in range(1, 4):
        room.ask(number, avoid=["well"])
        room.end(number, Verdict.BAD)
    (grant,) = grants(room.ask(10))
    weights = {each.worker_id: each.weight for each in grant.choice.candidates}
    assert weights["shaky"] == pytest.approx(weights["well"] * 0.8**6)


def test_everything_on_a_worker_that_says_nothing_more_is_given_up():
    room = fast_and_slow(1.0)
    for number in (1, 2):
        room.ask(number, tokens=1000, avoid=["slow"])
    room.ask(3, tokens=1000, avoid=["fast"])
    room.begin(1, after=1.0)
    room.begin(3)
    gave_up: list[int] = []
    for second in range(1, 60):
        room.now += 1.0
        gave_up += abandoned(room.tell(Tick({Ticket(3): 20 * second})))
        for ticket in set(gave_up) & {1, 2}:
            room.end(ticket, Verdict.BAD)
    assert sorted(ticket for ticket in set(gave_up) if ticket > 0) == [1, 2]
    assert room.view("fast").breaker is not Phase.CLOSED
    assert room.view("slow").breaker is Phase.CLOSED


def test_who_has_never_answered_is_not_given_up_for_being_slow():
    room = Room()
    room.add("new", old_cpu())
    room.ask(1, tokens=20_000)
    assert abandoned(room.ticks(300)) == []


# How much a worker gets


def test_without_a_word_on_slots_a_worker_gets_more_as_its_answers_come_in_time():
    room = Room()
    room.add("a", condition(slots=None))
    for number in range(1, 30):
        room.ask(number, tokens=100)
    assert room.view("a").running == 4
    for number in range(1, 5):
        room.begin(number, after=0.05)
    room.tick()
    assert room.view("a").running > 4


def test_people_in_line_get_room_that_was_just_learned_of():
    room = Room()
    room.add("a", condition(slots=None))
    for number in range(1, 6):
        room.ask(number, tokens=100)
    assert granted(room.begin(1, after=0.05)) == [(5, "a")]


def test_without_a_word_on_slots_a_worker_gets_less_when_its_answers_are_late():
    room = Room()
    room.add("a", condition(slots=None))
    for number in range(1, 5):
        room.ask(number, tokens=100)
    room.begin(1)
    room.now += 100
    for number in range(2, 5):
        room.begin(number)
    assert room.view("a").slots == 3


def test_a_worker_whose_first_token_always_takes_its_time_is_not_late():
    """A distant service, or one that thinks first: what has nothing to do with load says nothing of it."""
    room = Room()
    room.add("a", condition(slots=None), cap=8)
    for number in range(1, 100):
        room.ask(number, tokens=100)
        if number >= 8:
            room.now += 2
            for begun in range(number - 7, number + 1):
                room.begin(begun)
            room.end(number - 7, seconds=2.0, prompt=100, output=50)
    assert room.view("a").slots == 8


def test_a_cap_that_is_raised_or_lowered_counts_at_once():
    room = Room()
    room.add("a", condition(slots=8), cap=1)
    assert granted(room.ask(1) + room.ask(2) + room.ask(3)) == [(1, "a")]
    assert granted(room.add("a", condition(slots=8), cap=2)) == [(2, "a")]
    room.add("b", condition(slots=8), cap=8)
    room.ask(4, avoid=["a"])
    room.add("b", condition(slots=8), cap=1)
    assert room.ask(5, avoid=["a"]) == []


def test_what_a_worker_does_for_others_counts():
    room = Room()
    room.add("a", condition(slots=4))
    for _ in range(5):  # one report may lag
        room.report("a", condition(slots=4, running=3))
    assert granted([command for number in range(1, 5) for command in room.ask(number)]) == [(1, "a")]
    room.now += 5
    came = granted(room.report("a", condition(slots=4, running=1)) + room.tick())
    assert [ticket for ticket, _ in came] == [2, 3, 4]


def test_what_it_does_for_others_is_seen_while_it_is_busy_for_us_too():
    room = Room()
    room.add("a", condition(slots=4, running=0))
    room.ask(0)
    for number in range(1, 60):
        room.now += 0.5
        room.report("a", condition(slots=4, running=4))
        room.ask(number)
        room.end(number - 1)
    assert room.ask(100) == []


def test_others_who_have_left_do_not_count_while_it_is_busy_for_us():
    room = Room()
    room.add("a", condition(slots=4, running=3))
    room.ask(0)
    for number in range(1, 60):
        room.now += 0.5
        room.report("a", condition(slots=4, running=1))
        room.end(number - 1)
        room.ask(number)
    assert [granted(room.ask(number)) for number in (100, 101)] == [[(100, "a")], [(101, "a")]]


def test_memory_bounds_what_runs_although_slots_are_free():
    room = Room()
    room.add("a", vllm(memory=10_000))
    given = [number for number in range(1, 6) if granted(room.ask(number, tokens=4000))]
    assert given == [1, 2]
    assert granted(room.end(1)) == [(3, "a")]


def test_a_prompt_longer_than_its_context_is_not_sent_to_a_model():
    room = Room()
    for name, context in (("short", 4096), ("long", 131_072)):
        offer = ModelOffer(name=M, context_tokens=context)
        room.add(name, Condition(models=(offer,), slots=4))
    for number in range(1, 5):
        assert granted(room.ask(number, tokens=20_000)) == [(number, "long")]


# Names


def test_a_worker_is_asked_by_the_name_that_it_knows():
    room = Room()
    offers = (ModelOffer(name=ModelName("qwen2.5:7b-q4")),)
    aliases = ((ModelName("qwen"), ModelName("qwen2.5:7b-q4")),)
    room.add("a", Condition(models=offers, slots=4), aliases=aliases)
    (by_alias,) = grants(room.ask(1, model="qwen"))
    (by_name,) = grants(room.ask(2, model="qwen2.5:7b-q4"))
    assert (by_alias.model, by_name.model) == ("qwen2.5:7b-q4", None)
    assert list(room.dispatcher.snapshot(0).models) == ["qwen", "qwen2.5:7b-q4"]


def test_an_alias_joins_workers_that_call_a_model_differently():
    room = Room()
    for name, own in (("a", "qwen:7b"), ("b", "Qwen-7B")):
        offers = (ModelOffer(name=ModelName(own)),)
        room.add(name, Condition(models=offers, slots=1), aliases=((ModelName("qwen"), ModelName(own)),))
    both = grants(room.ask(1, model="qwen") + room.ask(2, model="qwen"))
    assert sorted((each.worker.id, each.model) for each in both) == [("a", "qwen:7b"), ("b", "Qwen-7B")]


def test_a_probe_asks_for_the_model_by_the_workers_own_name():
    room = Room()
    offers = (ModelOffer(name=ModelName("qwen:7b")),)
    aliases = ((ModelName("qwen"), ModelName("qwen:7b")),)
    (probe,) = probes(room.add("a", Condition(models=offers, slots=4, calibrates=True), aliases=aliases))
    assert probe.model == "qwen:7b"


# Many


def test_in_a_large_room_nobody_is_asked_who_was_just_found_dead():
    room = Room()
    for number in range(200):
        room.add(f"w{number}", condition())
    found_dead: set[str] = set()
    for number in range(1, 100):
        ((_, where),) = granted(room.ask(number))
        assert where not in found_dead
        found_dead.add(where)
        room.end(number, Verdict.BAD, unreachable=True)


def test_a_worker_that_left_and_came_back_still_has_what_runs_on_it():
    room = Room()
    room.add("a", condition(slots=1))
    room.ask(1)
    room.tell(Gone(WorkerId("a")))
    room.add("b", condition(slots=1))
    room.ask(2)
    assert granted(room.add("a", condition(slots=1)) + room.ask(3)) == []
    assert granted(room.end(1)) == [(3, "a")]


def named(name: str, known_as: str | None = None) -> Condition:
    """A worker's own name for a model, and the one that was made of its identity."""
    own = ModelOffer(name=ModelName(name), identity="m-7b q4_0")
    made = ModelOffer(
        name=ModelName("m-7b~q4_0"),
        identity="m-7b q4_0",
        known_as=ModelName(known_as or name),
        automatic=True,
    )
    return Condition(models=(own, made), slots=4)


def test_an_automatic_name_is_listed_where_it_brings_several_names_together():
    room = Room()
    room.add("a", named("m-q4.gguf"))
    room.add("b", named("m-q4.gguf"))
    assert list(room.dispatcher.snapshot(room.now).models) == ["m-q4.gguf"]
    room.add("c", named("m:7b"))
    assert list(room.dispatcher.snapshot(room.now).models) == ["m-7b~q4_0", "m-q4.gguf", "m:7b"]


def test_those_who_are_turned_away_are_told_to_come_one_after_the_other():
    room = Room(admission=AdmissionPolicy(max_waiting=0))
    room.add("a", condition(slots=1))
    room.ask(1)
    room.end(1, seconds=10.0)
    room.ask(2)
    pauses = [room.ask(number)[0].retry_after for number in (3, 4, 5)]
    assert pauses == [10.0, 20.0, 30.0]


def test_under_overload_the_client_that_came_last_comes_first_and_others_keep_their_order():
    room = Room()
    room.add("a", condition(slots=1))
    room.ask(1)
    room.end(1, seconds=10.0)
    room.ask(2, client="x")
    for number, client in ((3, "y"), (4, "y"), (5, "z")):
        room.now += 1
        room.ask(number, client=client)
    room.now += 10
    order = [granted(room.end(2, seconds=10.0))[0][0]]
    while len(order) < 3:
        order += [granted(room.end(order[-1], seconds=10.0))[0][0]]
    assert order == [5, 3, 4]
