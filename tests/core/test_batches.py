"""Class batch, ROUTING 2: it fills the room that people leave, paper by paper."""

from collections import Counter
from itertools import count, pairwise

import pytest

from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.model import Ended, Lost, Measures, Tick, Ticket, Verdict, WorkerId
from tests.core.rooms import BLOCK_TOKENS, Room, condition, granted, grants, llama_cpp, old_cpu, paper, vllm


def of_paper(number: int, prompt: int) -> int:
    return 100 * number + prompt


def send(room: Room, number: int, prompts: int, blocks: int = 20, **more):
    """A document's prompts, one after the other; their grants."""
    commands = []
    for prompt in range(prompts):
        commands += room.ask(
            of_paper(number, prompt), blocks=paper(number, blocks), batch=True, replayable=True, **more
        )
    return grants(commands)


def done(room: Room, ticket: int, after: float = 1.0):
    """It is read and answered; what follows."""
    commands = room.begin(ticket, after=after)
    return grants(commands + room.end(ticket, after=after, prompt=5160, output=100))


def served(room: Room, running: list[int], steps: int = 10_000) -> list[int]:
    """All that runs is answered in turn, until nothing runs; the tickets in the order of their grants."""
    order = list(running)
    while running and steps:
        steps -= 1
        for grant in done(room, running.pop(0)) + grants(room.tick()):
            order.append(grant.ticket)
            running.append(grant.ticket)
    return order


# One prompt


def test_a_short_prompt_is_served_too():
    room = Room()
    room.add("a", condition())
    assert granted(room.ask(1, tokens=100, batch=True)) == [(1, "a")]


@pytest.mark.parametrize("machines", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [0, 1, 20])
def test_nothing_waits_for_long_in_an_idle_room(machines, blocks):
    room = Room()
    for number in range(machines):
        room.add(f"w{number}", condition())
    commands = room.ask(1, tokens=256 * blocks + 240, blocks=paper(1, blocks), batch=True, max_output=1)
    assert [ticket for ticket, _ in granted(commands + room.ticks(5))] == [1]


@pytest.mark.parametrize("chats", [1, 3])
def test_the_last_paper_goes_to_a_worker_that_is_not_quite_idle(chats):
    room = Room()
    room.add("a", condition(slots=16))
    for number in range(chats):
        room.ask(10_000 + number)
        room.begin(10_000 + number)
    room.now += 40
    commands = room.ask(1, blocks=paper(1, 20), batch=True)
    for second in range(60):
        room.now += 1
        received = {Ticket(10_000 + number): 20 * second + 1 for number in range(chats)}
        commands += room.tell(Tick(received))
    assert granted(commands) == [(1, "a")]


def test_a_batch_prompt_that_failed_on_the_fast_worker_is_done_on_the_slow_one():
    room = Room()
    room.add("fast", vllm())
    room.add("slow", old_cpu())
    (first,) = send(room, 1, 1)
    assert first.worker.id == "fast"
    room.end(of_paper(1, 0), Verdict.BAD)
    again = room.ask(5, blocks=paper(1, 20), batch=True, avoid=["fast"], admitted=True)
    assert granted(again + room.ticks(60)) == [(5, "slow")]


def test_a_paper_that_this_worker_may_not_have_does_not_keep_others_from_it():
    room = Room()
    room.add("a", condition(slots=1))
    room.add("b", condition())
    room.ask(1, avoid=["b"])
    longest = room.ask(2, blocks=paper(2, 40), batch=True, avoid=["b"])
    shorter = room.ask(3, blocks=paper(3, 20), batch=True)
    assert granted(longest + shorter + room.ticks(5)) == [(3, "b")]


# Papers


@pytest.mark.parametrize("engine", [vllm, llama_cpp])
def test_followers_wait_for_the_first_and_then_go_where_it_was(engine):
    room = Room()
    room.add("a", engine())
    room.add("b", old_cpu())
    (first,) = send(room, 1, 3)
    assert room.ticks(0.5) == []
    home = first.worker.id
    followers = done(room, first.ticket)
    assert {each.worker.id for each in followers} == {home}
    assert sorted(served(room, [each.ticket for each in followers])) == [
        of_paper(1, 1),
        of_paper(1, 2),
    ]


def test_where_a_prefix_in_use_can_be_shared_followers_run_beside_the_first():
    room = Room()
    room.add("a", vllm())
    (first,) = send(room, 1, 2)
    (second,) = grants(room.begin(first.ticket, after=1.0))
    assert (second.ticket, second.choice.because) == (of_paper(1, 1), "its prefix is here")


def test_where_it_cannot_they_run_after_one_another():
    room = Room()
    room.add("a", llama_cpp())
    (first,) = send(room, 1, 2, blocks=60)
    assert grants(room.begin(first.ticket, after=6.0) + room.tick()) == []
    (second,) = grants(room.end(first.ticket, prompt=15_400, output=100))
    assert (second.ticket, second.choice.because) == (of_paper(1, 1), "its prefix is here")


def test_a_prefix_is_computed_a_second_time_where_so_much_waits_for_it_that_this_pays():
    room = Room()
    room.add("a", llama_cpp())
    (first,) = send(room, 1, 40)
    (second,) = grants(room.begin(first.ticket, after=1.0))
    assert second.choice.because == "so much waits for this prefix"


def test_one_batch_prompt_is_read_at_a_time():
    room = Room()
    room.add("a", vllm())
    (first,) = [each for number in range(1, 11) for each in send(room, number, 1)]
    (second,) = grants(room.begin(first.ticket, after=2.0))
    assert len(grants(room.begin(second.ticket, after=2.0))) == 1


def test_the_longest_paper_is_begun_first():
    room = Room()
    room.add("a", condition(slots=1))
    room.ask(1)
    for number, blocks in ((1, 10), (2, 30), (3, 20)):
        send(room, number, 1, blocks)
    room.now += 100
    order = served(room, [1])
    assert order == [1, of_paper(2, 0), of_paper(3, 0), of_paper(1, 0)]


def test_a_paper_is_not_begun_on_a_worker_that_would_finish_it_later_than_the_room():
    room = Room()
    room.add("fast", vllm())
    room.add("slow", old_cpu())
    assert {each.worker.id for each in send(room, 1, 5) + grants(room.ticks(5))} == {"fast"}


def test_a_slow_worker_takes_its_share_of_a_large_batch():
    room = Room()
    room.add("fast", llama_cpp())
    room.add("slow", old_cpu())
    given = [each for number in range(1, 60) for each in send(room, number, 5)]
    given += grants(room.ticks(2))
    assert {each.worker.id for each in given} == {"fast", "slow"}


def test_a_follower_is_stolen_that_would_be_done_later_at_home():
    room = Room()
    room.add("slow", old_cpu())
    (first,) = send(room, 1, 5)
    came = grants(room.add("fast", vllm()) + room.ticks(1))
    assert [(each.worker.id, each.choice.because) for each in came][:1] == [
        ("fast", "it would be done later at home")
    ]
    assert first.ticket not in {each.ticket for each in came}


def test_what_is_stolen_fits_into_memory_too():
    room = Room()
    room.add("slow", old_cpu())
    for number in range(1, 4):
        send(room, number, 4, blocks=30)
    commands = room.add("fast", vllm(memory=20_000))
    held: list[int] = []
    for _ in range(20):
        came = [each for each in grants(commands) if each.worker.id == "fast"]
        held += [each.ticket for each in came]
        commands = [command for each in came for command in room.begin(each.ticket)] + room.tick(0.5)
    assert held
    papers = len({ticket // 100 for ticket in held})
    assert papers * 30 * BLOCK_TOKENS <= 20_000


def test_two_clients_with_the_same_document_each_have_their_paper():
    """Their prompts come in turn; each paper is still read once."""
    room = Room()
    room.add("a", llama_cpp(slots=2))
    room.add("b", llama_cpp(slots=2))
    commands = []
    for prompt in range(4):
        for number, client in ((1, "x"), (2, "y")):
            commands += room.ask(of_paper(number, prompt), blocks=paper(9, 20), batch=True, client=client)
    begun = grants(commands)
    assert sorted(each.ticket for each in begun) == [of_paper(1, 0), of_paper(2, 0)]
    because = Counter(each.choice.because for each in begun)
    running = [each.ticket for each in begun]
    while running:
        came = done(room, running.pop(0)) + grants(room.tick())
        because.update(each.choice.because for each in came)
        running += [each.ticket for each in came]
    assert because["a paper that it can finish in time"] == 2


def test_the_papers_of_a_worker_that_is_lost_are_begun_elsewhere():
    room = Room()
    room.add("a", llama_cpp())
    (first,) = send(room, 1, 3)
    room.add("b", old_cpu())
    room.tell(Lost(WorkerId("a"), "no report", abandon=True))
    commands = room.tell(Ended(Ticket(first.ticket), Verdict.BAD, Measures(seconds=1)))
    commands += room.ask(50, blocks=paper(1, 20), batch=True, avoid=["a"], admitted=True)
    running = [each.ticket for each in grants(commands + room.ticks(2))]
    assert room.view("b").running == 1
    assert sorted({*served(room, running)}) == [50, of_paper(1, 1), of_paper(1, 2)]


# Copies


def straggling(policy: BatchPolicy | None = None) -> tuple[Room, int]:
    """One prompt runs on a slow machine, and a fast one comes."""
    room = Room(batch=policy or BatchPolicy())
    room.add("slow", old_cpu())
    (first,) = send(room, 1, 1)
    room.add("fast", vllm())
    return room, first.ticket


def test_a_straggler_is_copied_to_an_idle_worker_that_is_done_much_sooner():
    room, straggler = straggling()
    (copy,) = grants(room.tick(0.25))
    assert (copy.copy_of, copy.worker.id) == (straggler, "fast")
    assert copy.ticket != straggler
    assert grants(room.ticks(5)) == [], "one copy is enough"


def test_the_first_answer_wins_and_both_end():
    room, straggler = straggling()
    (copy,) = grants(room.tick(0.25))
    room.begin(copy.ticket, after=1)
    assert grants(room.end(copy.ticket, after=1, prompt=5160, output=100)) == []
    assert grants(room.end(straggler, Verdict.UNKNOWN)) == []
    assert (room.view("slow").running, room.view("fast").running) == (0, 0)
    assert grants(room.ticks(5)) == []


def test_a_copy_that_failed_may_be_followed_by_another():
    room, straggler = straggling()
    (copy,) = grants(room.tick(0.25))
    room.end(copy.ticket, Verdict.UNKNOWN)
    assert [each.copy_of for each in grants(room.tick(0.25))] == [straggler]


def test_what_a_client_sees_growing_is_never_copied():
    room = Room()
    room.add("slow", old_cpu())
    room.ask(1, blocks=paper(1, 20), batch=True, replayable=False)
    room.ask(2, blocks=paper(2, 20), replayable=True)
    room.add("fast", vllm())
    assert grants(room.ticks(5)) == []


def test_nothing_is_copied_to_a_worker_that_failed_it():
    room = Room()
    room.add("slow", old_cpu())
    room.ask(1, blocks=paper(1, 20), batch=True, replayable=True, avoid=["fast"])
    room.add("fast", vllm())
    assert grants(room.ticks(5)) == []


# People and batch


def test_batch_fills_an_idle_room():
    room = Room()
    room.add("a", vllm(slots=4))
    running = send(room, 1, 10)
    while running:
        last = running.pop()
        running = grants(room.begin(last.ticket, after=0.1))
    assert room.view("a").running == 4


def test_while_people_chat_half_of_the_slots_are_kept_for_them():
    room = Room()
    room.add("a", vllm(slots=8))
    room.ask(1)
    room.end(1)
    running = send(room, 1, 20, blocks=1)
    while running:
        last = running.pop()
        running = grants(room.begin(last.ticket, after=0.1))
    assert room.view("a").running == 4
    came = []
    for second in range(1, 40):
        room.now += 1
        came += grants(room.tell(Tick({Ticket(of_paper(1, n)): 20 * second for n in range(4)})))
    assert len(came) == 1


def test_while_people_chat_a_long_prompt_is_read_in_slices():
    room = Room()
    room.add("a", llama_cpp())
    room.teach("a", prefill=1000, token=0.02)
    slices: list[int] = []
    ticket = 1
    commands = room.ask(ticket, blocks=paper(1, 20), batch=True)
    while (grant := grants(commands)[0]).warm_chars is not None:
        slices.append(grant.warm_chars)
        seconds = (grant.warm_chars - (slices[-2] if slices[1:] else 0)) / 4 / 1000
        room.begin(ticket, after=seconds)
        room.end(ticket, seconds=seconds, prompt=grant.warm_chars // 4, output=1)
        ticket += 1
        commands = room.ask(ticket, blocks=paper(1, 20), batch=True, admitted=True)
    assert slices == sorted(set(slices))
    assert len(slices) > 5
    longest = max(later - earlier for earlier, later in pairwise(slices))
    assert longest / 4 / 1000 <= 0.8, "about half a second of reading each"
    assert grant.choice.candidates[0].cached_tokens * 4 >= slices[-1] - 1


def test_without_people_a_long_prompt_is_read_at_once():
    room = Room()
    room.add("a", llama_cpp())
    room.teach("a", prefill=1000, token=0.02)
    room.now += 31
    (grant,) = send(room, 1, 1)
    assert grant.warm_chars is None


def test_nothing_of_batch_is_read_beside_a_chats_prompt():
    room = Room()
    room.add("a", vllm())
    room.ask(1, tokens=4000)
    assert [each for number in range(1, 11) for each in send(room, number, 1)] == []
    assert len(grants(room.begin(1, after=1.0) + room.tick())) == 1


@pytest.mark.parametrize("at_once", [2, 4, 12])
def test_batch_gets_its_share_while_people_would_take_every_slot(at_once):
    """So many people, each of whom asks again with every answer; everything takes 2 s."""
    room = Room()
    room.add("a", vllm(slots=4))
    room.teach("a", prefill=4000, token=0.02)
    asks = {}
    for number in range(1, 301):
        asks[number] = paper(number, 4)
    chat, ends = count(1_000_000), {}
    answered = Counter()

    def sent(number: int, **more) -> None:
        perform(room.ask(number, **more))

    def perform(commands) -> None:
        for each in grants(commands):
            ends[each.ticket] = room.now + 2.0, each.warm_chars
            perform(room.begin(each.ticket))

    for number, blocks in asks.items():
        sent(number, blocks=blocks, batch=True)
    for _ in range(at_once):
        sent(next(chat), tokens=400)
    for _ in range(2400):
        room.now += 0.25
        perform(room.tell(Tick({Ticket(each): int(8 * room.now) for each in ends})))
        for ticket in [ticket for ticket, (at, _) in ends.items() if at <= room.now]:
            _, warm = ends.pop(ticket)
            is_chat = ticket >= 1_000_000
            tokens = 400 if is_chat else 1064 if warm is None else warm // 4
            perform(room.end(ticket, seconds=2.0, prompt=tokens, output=50 if warm is None else 1))
            if is_chat:
                answered["chat"] += 450
                sent(next(chat), tokens=400)
            elif warm is None:
                answered["batch"] += 1114
            else:
                sent(ticket, blocks=asks[ticket], batch=True, admitted=True)
    assert answered["batch"] >= 0.04 * sum(answered.values())
    undisturbed = 450 * min(at_once, 4) * 600 / 2
    assert answered["chat"] >= 0.8 * undisturbed, "people still come first"


# Clients


def test_two_clients_of_class_batch_are_served_alike_over_a_long_history():
    room = Room()
    room.add("a", condition(slots=1))
    room.ask(9999)
    for number in range(1, 41):
        send(room, number, 1, client="many" if number <= 30 else "few")
    room.now += 100
    order = served(room, [9999])[1:]
    assert len(order) == 40
    first = [ticket // 100 > 30 for ticket in order[:20]]
    assert 9 <= sum(first) <= 11


def test_a_client_that_left_leaves_nothing_behind():
    room = Room()
    room.add("a", condition(slots=1), cap=1)
    room.ask(9999)
    send(room, 1, 3)
    for prompt in range(3):
        assert room.end(of_paper(1, prompt), Verdict.UNKNOWN) == []
    assert room.waiting == 0
    assert grants(room.end(9999) + room.ticks(60)) == []


def test_a_broken_worker_gets_no_paper():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=1000))
    room.add("broken", vllm())
    room.ask(9999)
    room.end(9999, Verdict.BAD)
    room.add("well", old_cpu())
    assert {each.worker.id for n in range(1, 5) for each in send(room, n, 2)} == {"well"}


def test_where_people_wait_for_answers_a_batch_pauses_between_its_prompts():
    """While an engine reads, answers hardly grow: without a pause a chat beside a batch would never end."""
    room = Room()
    room.add("a", vllm(slots=8))
    room.ask(1, tokens=100)
    room.begin(1)
    commands = room.ask(2, blocks=paper(1, 40), batch=True)
    (slice_,) = grants(commands)
    assert slice_.warm_chars is not None
    room.now += 1.0
    room.begin(slice_.ticket)
    room.end(slice_.ticket, seconds=1.0, prompt=2000, output=1)
    assert granted(room.ask(3, blocks=paper(1, 40), batch=True, admitted=True)) == []
    room.now += 0.1
    assert granted(room.tell(Tick())) == []
    room.now += 0.15
    assert [number for number, _ in granted(room.tell(Tick()))] == [3]
